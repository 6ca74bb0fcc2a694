"""`report.html` in a real browser: no request, no console message, every plot drawn, on a phone and in the dark."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from tests.samples import made_up, made_up_report, made_up_served, made_up_sweep
from trsp_deploy.tools.reports import html, markdown, plots, sweep_page
from trsp_deploy.tools.reports.rows import sweep_columns, sweep_rows
from trsp_deploy.tools.triton_server.served import derive

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no headless browser: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, served = made_up(speedup=1.25, noise=0.01), made_up_served()
    path = tmp_path_factory.mktemp("page") / "report.html"
    report = made_up_report(made).model_copy(update={"served": derive(served), "sweep": made_up_sweep()})
    path.write_text(html.render(report, {"ort-cpu-fp32": made}, served=served), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "sweep.html"
    path.write_text(sweep_page.render(made_up_sweep()), encoding="utf-8")
    return path


def chromium(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    return subprocess.run(
        [CHROMIUM, *flags, *options], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )


def test_the_page_is_one_file_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text), "nothing is loaded from elsewhere"
    assert "<script" not in text and "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two plots share an id"
    for used in re.findall(r"url\(#([^)]+)\)", text):
        assert used in ids
    assert not re.search("|".join(plots.VARIABLES), text), "a placeholder colour is left"


def test_page_markdown_and_record_say_the_same(page: Path) -> None:
    made = made_up(speedup=1.25, noise=0.01)
    report = made_up_report(made)
    ratio = report.engines[0].comparison.of("total").speedup  # type: ignore[union-attr]
    shown = f"{ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    assert shown in page.read_text() and shown in markdown.render(report)


def test_the_page_has_every_figure_of_the_other_cuts_that_markdown_has(page: Path) -> None:
    found = made_up_sweep()
    for cells in (sweep_columns(found), *sweep_rows(found)):
        assert all(f">{cell}</t" in page.read_text() for cell in cells), cells


@pytest.mark.parametrize(
    ("speedup", "limit", "assumed", "wholly", "words"),
    [
        (1.25, 1.30, False, False, "end to end, of 1.30x possible"),
        (1.299, 1.296, False, False, "end to end, of 1.30x possible"),  # both are shown as 1.30
        (1.33, 1.30, False, False, "end to end; 1.30x possible, the rest is noise"),
        (1.33, 1.30, False, True, "end to end; 1.30x possible, distrust it"),  # what noise explains reaches below
        (1.25, 1.30, True, False, "end to end, of 1.30x assumed possible"),
        (1.33, 1.30, True, False, "end to end; 1.30x assumed possible"),
        (1.33, None, False, False, "end to end"),
    ],
)
def test_a_speedup_above_its_limit_is_said_to_be_noise_or_to_be_distrusted(
    speedup: float, limit: float | None, assumed: bool, wholly: bool, words: str
) -> None:
    """wholly: whether its whole interval is above."""
    made = made_up(speedup=1.25, noise=0.01)
    report = made_up_report(made)
    engine, *others = report.engines
    assert engine.comparison is not None
    total = engine.comparison.of("total")
    shown = total.speedup.model_copy(update={"ratio": speedup})
    found = total.model_copy(update={"limit": limit, "limit_assumed": assumed, "speedup": shown, "above_limit": wholly})
    phases = tuple(found if phase is total else phase for phase in engine.comparison.phases)
    comparison = engine.comparison.model_copy(update={"phases": phases})
    changed = report.model_copy(update={"engines": (engine.model_copy(update={"comparison": comparison}), *others)})
    assert f"<span>{words}</span>" in html.render(changed, {"ort-cpu-fp32": made})


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    made = made_up()
    report = made_up_report(made, model="<script>alert(1)</script>")
    assert "<script" not in html.render(report, {"ort-cpu-fp32": made})


@browser
def test_a_browser_has_nothing_to_complain_about(page: Path, tmp_path: Path) -> None:
    done = chromium(tmp_path, "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri())
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('role="img"') == 8 and "Faster: ort-cpu-fp32" in done.stdout
    assert "Other cuts of this model" in done.stdout and "Drop 6 of 10 layers (drop-6)" in done.stdout


@browser
def test_a_browser_has_nothing_to_complain_about_in_a_sweep(sweep: Path, tmp_path: Path) -> None:
    done = chromium(tmp_path, "--enable-logging=stderr", "--v=0", "--dump-dom", sweep.as_uri())
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('role="img"') == 2 and "Drop 6 of 10 layers (drop-6)" in done.stdout


@browser
@pytest.mark.parametrize("name", ["page", "sweep"])
def test_nothing_is_wider_than_a_phone(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    content, frame = in_a_frame(request.getfixturevalue(name), tmp_path, 390, "root.scrollWidth", "root.clientWidth")
    assert 0 < content <= frame <= 390


@browser
@pytest.mark.parametrize("width", [390, 1100])
def test_no_text_is_hidden_behind_a_scroll_bar(page: Path, tmp_path: Path, width: int) -> None:
    """Figures may be; sentences beside a label may not, however long the label."""
    long = tmp_path / "long.html"
    label = "quality budgets, an-engine-with-a-long-name-of-its-own"
    long.write_text(page.read_text(encoding="utf-8").replace("<th>model</th>", f"<th>{label}</th>"), encoding="utf-8")
    assert label in long.read_text()
    tables = "[...root.querySelectorAll('.labels')].map(table => table.parentElement)"
    hidden = f"{tables}.filter(wide => wide.scrollWidth > wide.clientWidth).length"
    assert in_a_frame(long, tmp_path, width, hidden, f"{tables}.length") == (0, 2)


def in_a_frame(page: Path, folder: Path, width: int, *asked: str) -> tuple[int, ...]:
    """Numbers that a page's `root` gives in a frame of this width, for the pages allow no script of their own."""
    script = (
        "const root = document.querySelector('iframe').contentDocument.documentElement;"
        f"document.title = [{', '.join(asked)}].join(' ')"
    )
    frame = folder / "frame.html"
    shown = f'<iframe width="{width}" height="800" frameborder="0" srcdoc="{escape(page.read_text(encoding="utf-8"))}">'
    frame.write_text(f'<body onload="{escape(script)}">{shown}</iframe>')
    done = chromium(folder, "--dump-dom", f"--window-size={width + 50},900", frame.as_uri())
    numbers = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert numbers is not None, done.stderr
    return tuple(map(int, numbers[1].split()))


@browser
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_screenshot_has_ink_on_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    image = tmp_path / "page.png"
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = chromium(tmp_path, *options, f"--window-size={width},2400", f"--screenshot={image}", page.as_uri())
    assert done.returncode == 0 and image.is_file(), done.stderr
    from matplotlib.image import imread

    pixels = imread(image)[..., :3]
    background = pixels[2, 2]
    assert (background.mean() < 0.3) == dark
    assert pixels.std() > 0.02, "an empty page"
