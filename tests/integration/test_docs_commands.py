"""Every `trsp-deploy` line of the docs, run as it stands, page by page: `make test-docs`.

The models that they name are tiny ones in folders of those names, what trains or measures is told to do little of it,
and a launcher starts two processes on the CPU. Other programs' lines are marked on the page. What cannot run on a
machine without network, GPU and server is named with the test that runs it where it can.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.command import LAUNCHED, QUICK, Done, trsp_deploy
from tests.doc_lines import GENERATED, PAGES, ROOT, lines_of
from tests.tiny import english, save_tiny
from trsp_deploy.tools.sources.packaged import find_asset

pytestmark = pytest.mark.slow

HEAVY = ("prune", "prune-and-build", "sweep")  # take a recipe: texts of one's own, one engine, little of everything
TEXTS = {"--calibration": "calibration.texts=texts.jsonl", "--eval": "evaluation={held: held-out.jsonl}"}
WITHOUT_GPU = {"tensorrt-l4-int8": "ort-cpu-int4"}
# Command -> exit codes beside 0 that say what was found (docs/exit-codes.md), where that is a tiny model's.
VERDICTS = {"check": {2, 3}, "sweep": {2}}
ELSEWHERE = {
    "fetch": "tests/unit/test_packaged.py::test_real_fetch",
    "convert": "tests/unit/test_models.py::test_a_conversion_is_found_by_the_models_name",
    "triton-start": "tests/integration/test_triton_repository.py",
    "bench-server": "tests/integration/test_triton_repository.py",
}
RECIPE = {
    "model": "MODEL",
    "drop": 2,
    "calibration": {"texts": "texts.jsonl"},
    "evaluation": {"held": "held-out.jsonl"},
    "engines": ["ort-cpu-fp32"],
}
DOCUMENTED = {
    page.relative_to(ROOT).as_posix(): [line for line in lines_of(page) if line.whole]
    for page in PAGES
    if page != GENERATED
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which someone reads the docs, with the files that they take for granted."""
    folder = tmp_path_factory.mktemp("reader")
    save_tiny("llama", folder / "smollm2-135m", hidden_size=64, num_hidden_layers=30)
    save_tiny("opt", folder / "opt-6.7b", hidden_size=64, word_embed_proj_dim=64)
    for name in ("MODEL", "llama2-7b", "my-llama"):
        save_tiny("llama", folder / name, hidden_size=64)
    names = ("texts.jsonl", "held-out.jsonl", "chat.jsonl", "held-out-chat.jsonl")
    for name, start in zip(names, range(0, 240_000, 60_000), strict=True):
        rows = [json.dumps({"text": english()[at : at + 2000]}) for at in range(start, start + 60_000, 2000)]
        (folder / name).write_text("\n".join(rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = heavy(["prune-and-build", "--recipe", "recipe.yaml", "--out", "RUN"])
    assert trsp_deploy(*command, cwd=folder).code == 0
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "NAME").symlink_to(folder / "RUN")
    return folder


# What a page takes for granted that no other does.
BEFORE: dict[str, Callable[[Path], object]] = {
    "docs/ci.md": lambda folder: trsp_deploy("baseline", "RUN", "--out", "baseline.json", cwd=folder),
}


@pytest.mark.parametrize("page", [page for page, lines in DOCUMENTED.items() if lines])
def test_the_commands_of_a_page_run(page: str, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "docs/triton.md" and find_asset("triton-schema") is None:
        pytest.skip("triton-schema is not here: trsp-deploy fetch triton-schema")
    monkeypatch.setenv("RUN", "RUN")
    BEFORE.get(page, lambda folder: None)(reader)
    for _, text, _, launcher in DOCUMENTED[page]:
        words = shlex.split(re.sub(r"\$(\w+)", r"\1", text))
        before, words = ([words[0], "0" * 32], words[2:]) if words[0] == "--trust-remote-code" else ([], words)
        name = words[0]
        if name in ELSEWHERE:
            continue
        words = [WITHOUT_GPU.get(word, word) for word in words]
        words = [*before, *(heavy(words) if name in HEAVY else words)]
        done = launched(launcher, words, reader) if launcher else trsp_deploy(*words, cwd=reader)
        said = f"{page}: trsp-deploy {text}: exit code {done.code}\n{done.stderr}"
        assert done.code in {0, *VERDICTS.get(name, ())}, said
        redirected = re.search(rf"trsp-deploy {re.escape(text)} > (\S+)", (ROOT / page).read_text(encoding="utf-8"))
        if redirected:
            (reader / redirected[1]).write_text(done.stdout)


def launched(launcher: str, words: list[str], reader: Path) -> Done:
    """A line of `accelerate launch` with two processes, on the CPU, from the beginning even where the page has another
    line for the same folder."""
    two, count = re.subn(r"(--num_processes) \d+", r"\1 2", launcher.removeprefix("accelerate launch "))
    assert count == 1, launcher
    shutil.rmtree(reader / words[words.index("--out") + 1], ignore_errors=True)
    free_port = ["--main_process_port", "0"]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *shlex.split(two),
        *free_port,
        "-m",
        "trsp_deploy",
        *words,
    ]
    done = subprocess.run(command, cwd=reader, env=LAUNCHED, capture_output=True, text=True, timeout=600, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def heavy(words: list[str]) -> list[str]:
    """A command that takes a recipe, told to do little."""
    settings = [*QUICK, "device=cpu"]
    if "recipe.yaml" not in words:  # whose texts and engine are such already
        settings += ["engines=[ort-cpu-fp32]"]
        settings += [value for option, value in TEXTS.items() if option not in words]
    return [*words, *(part for pair in settings for part in ("--set", pair))]


def test_what_runs_elsewhere_is_there() -> None:
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") if name else (ROOT / file).is_file()
