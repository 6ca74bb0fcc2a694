"""A server under load: what made-up samples whose truth is known say, and what the load generator's answers become."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.breadth import BREADTH
from tests.command import PYTHON_SCRIPT
from tests.samples import NEW_TOKENS_SERVED, made_up, made_up_report, made_up_served
from tests.tiny import save_tiny
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Case
from trsp_deploy.results import Served, ServedWindow
from trsp_deploy.stages.serve_bench import _order
from trsp_deploy.tools.reports import html, markdown, plots
from trsp_deploy.tools.triton_server import load
from trsp_deploy.tools.triton_server.load import LoadGenerator, prompts_of
from trsp_deploy.tools.triton_server.served import (
    METRICS,
    ServedReport,
    derive,
    inter_token_s,
    served_notes,
    served_rows,
    served_sentence,
    tokens_per_s,
)


def test_figures_are_those_of_the_field() -> None:
    report = derive(made_up_served(noise=0.0, speedup=1.25))
    one, eight = report.levels
    dense = one.figures["dense"]
    assert dense.requests == 2 * 3 * 6 / 2  # three requests in each of six windows
    assert dense.first_s["p50"] == pytest.approx(0.1) and dense.inter_token_s["p50"] == pytest.approx(0.01)
    assert dense.request_s["p50"] == pytest.approx(0.25)
    assert dense.tokens_per_s == pytest.approx(NEW_TOKENS_SERVED / 0.25)  # Little's law, one request in the air
    assert eight.figures["dense"].tokens_per_s == pytest.approx(8**0.5 * NEW_TOKENS_SERVED / 0.25)
    for metric in METRICS:
        assert one.speedup[metric].found.ratio == pytest.approx(1.25)
        assert one.speedup[metric].control.ratio == pytest.approx(1)


def test_dense_is_the_mean_of_both_its_turns() -> None:
    """10% slower the second time: half of it is dense's, in logs, and all of it the control's."""
    served = made_up_served(noise=0.0, speedup=1.25)
    windows = [slower(window, 1.1) if window.subject == "again" else window for window in served.windows]
    level = derive(served.model_copy(update={"windows": tuple(windows)})).levels[0]
    for metric in METRICS:
        assert level.speedup[metric].found.ratio == pytest.approx(1.25 * 1.1**0.5)
        assert level.speedup[metric].control is not None
        assert level.speedup[metric].control.ratio == pytest.approx(1.1)


def slower(window: ServedWindow, share: float) -> ServedWindow:
    """The same with all times so many times as long."""
    requests = [
        each.model_copy(update={"answered_s": tuple(share * at_s for at_s in each.answered_s)})
        for each in window.requests
    ]
    return window.model_copy(update={"requests": tuple(requests)})


def test_a_windows_rate_is_of_all_its_requests() -> None:
    """Two of 0.25 s and one of 1 s, two in the air: 2 x 16 tokens over the mean, half a second, and no median."""
    window = made_up_served(noise=0.0).windows[0]
    quick = window.requests[0]
    (slow,) = slower(window.model_copy(update={"requests": (quick,)}), 4.0).requests
    assert quick.answered_s[-1] == pytest.approx(0.25)
    unlike = window.model_copy(update={"requests": (quick, quick, slow), "concurrency": 2})
    assert tokens_per_s(unlike) == pytest.approx(2 * NEW_TOKENS_SERVED / 0.5)


def test_a_speedup_is_claimed_when_it_is_there_and_only_then() -> None:
    assert served_sentence(derive(made_up_served(1.25, 0.01))).startswith("CONFIRMED as served on ort-cpu-fp32: ")
    assert served_sentence(derive(made_up_served(1.0, 0.05))).startswith("INCONCLUSIVE")
    assert served_sentence(derive(made_up_served(0.8, 0.01))).startswith("NOT THERE")
    assert served_sentence(derive(made_up_served(1.25, 0.01, replicates=3))).startswith("INCONCLUSIVE")


@BREADTH
def test_a_model_alone_is_shown_and_not_compared() -> None:
    served = made_up_served()
    alone = served.model_copy(update={"windows": tuple(w for w in served.windows if w.subject == "pruned")})
    report = derive(alone)
    assert "nothing is compared" in served_sentence(report)
    assert all(row[2] == row[4] == row[5] == "" and row[3] for row in served_rows(report))
    made = made_up()
    alone_page = html.render(made_up_report(made).model_copy(update={"served": report}), {"ort-cpu-fp32": made})
    both_page = html.render(made_up_report(made).model_copy(update={"served": derive(served)}), {"ort-cpu-fp32": made})
    for page, turns, models in (
        (alone_page, "pruned alone", "pruned"),
        (both_page, "dense, dense again and pruned in turn", "dense and pruned"),
    ):
        assert f"(triton 2.51.0): {turns}, 32 tokens a prompt" in page
        assert f"<figcaption>{models.capitalize()} on one Triton server, streamed.</figcaption>" in page
        assert f"latency of {models} on one server" in page


def with_requests(dense: int, pruned: int) -> Served:
    """Made-up samples of two windows, with so many requests in each."""
    served = made_up_served(replicates=2)
    counts = {"dense": dense, "again": dense, "pruned": pruned}
    windows = [w.model_copy(update={"requests": w.requests[:1] * counts[w.subject]}) for w in served.windows]
    return served.model_copy(update={"windows": tuple(windows)})


@BREADTH
@pytest.mark.parametrize(
    ("each", "tails"),
    [
        (99, []),
        (100, ["p90"]),
        (199, ["p90"]),
        (200, ["p90", "p95"]),
        (999, ["p90", "p95"]),
        (1000, ["p90", "p95", "p99"]),
    ],
)
def test_a_percentile_needs_requests_beyond_it(each: int, tails: list[str]) -> None:
    """A p99 was shown of 120 requests, of which one was slower; `compare` asks for twenty."""
    report = derive(with_requests(each, each))
    for figures in report.levels[0].figures.values():
        for times in (figures.first_s, figures.inter_token_s, figures.request_s):
            assert list(times) == ["p50", *tails]
    rows = served_rows(report)
    assert rows[0][:4] == ("1", "requests", str(2 * each), str(2 * each))
    assert [row[1] for row in rows if row[0] == "1" and row[1].startswith("request latency")] == [
        "request latency",
        *(f"request latency, {tail}" for tail in tails),
    ]
    assert "p90, p95 and p99 where 20 requests lie beyond: of 200, 400 and 2,000" in served_notes(report)[1]
    assert re.findall(r"the band goes to (\w+)", plots.serving(report)) == tails[-1:]


def test_a_percentile_that_one_model_lacks_is_blank() -> None:
    report = derive(with_requests(dense=199, pruned=200))
    (row,) = [row for row in served_rows(report) if row[:2] == ("1", "time to first token, p95")]
    assert row[2] == "" and row[3].endswith(" ms")
    assert "the band goes to p90" in plots.serving(report), "which both have"


def test_a_report_from_when_fewer_requests_were_enough_is_read() -> None:
    """Its figures have p95 and p99 and no p90."""
    report = derive(made_up_served()).model_dump(mode="json")
    for figures in (figures for level in report["levels"] for figures in level["figures"].values()):
        for name in ("first_s", "inter_token_s", "request_s"):
            figures[name] |= {"p95": 0.2, "p99": 0.3}
    older = ServedReport.model_validate(report)
    assert [row[1] for row in served_rows(older)][2:5:2] == ["time to first token", "time to first token, p99"]
    assert "the band goes to p99" in plots.serving(older)


def test_the_report_has_serving_beside_the_engines_own() -> None:
    made = made_up(speedup=1.25, noise=0.01)
    report = made_up_report(made).model_copy(update={"served": derive(made_up_served())})
    text = markdown.render(report)
    assert "## On a server" in text and "the engine alone, one text: 1.2" in text
    (engine, *others), eight = report.engines, Case(batch_size=8, prompt_tokens=128, new_tokens=4)
    assert engine.comparison is not None
    phases = tuple(phase.model_copy(update={"case": eight}) for phase in engine.comparison.phases)
    batched = engine.model_copy(update={"comparison": engine.comparison.model_copy(update={"phases": phases})})
    text = markdown.render(report.model_copy(update={"engines": (batched, *others)}))
    assert "the engine alone, batch 8, prompt 128: 1.2" in text and "one text" not in text


@BREADTH
@pytest.mark.parametrize(("engine", "server", "mood"), [(1.25, 1.25, "good"), (1.25, 0.8, ""), (0.8, 0.8, "bad")])
def test_the_pages_colour_is_of_the_served_claim_too(engine: float, server: float, mood: str) -> None:
    """NOT THERE as served stood in a green box."""
    made = made_up(speedup=engine)
    report = made_up_report(made).model_copy(update={"served": derive(made_up_served(server))})
    page = html.render(report, {"ort-cpu-fp32": made})
    assert f'<div class="verdict {mood}">' in page
    unmeasured = report.model_copy(update={"engines": report.engines[1:]})
    assert '<div class="verdict ">' in html.render(unmeasured, {}), "it says that no acceleration is claimed"


def test_every_order_of_three_comes_once_in_six() -> None:
    orders = {tuple(_order(["dense", "again", "pruned"], replicate)) for replicate in range(6)}
    assert len(orders) == 6


def generator(folder: Path, code: str) -> LoadGenerator:
    """A program in perf_analyzer's place."""
    path = folder / "perf_analyzer"
    path.write_text(f"{PYTHON_SCRIPT}import json, sys\n{code}\n")
    path.chmod(0o755)
    return LoadGenerator(path)


EXPORT = """
answers = [{"text_output": "a", "output_tokens": n} for n in (1, 3, 4)]
request = {"timestamp": 2_000_000_000, "response_timestamps": [2_100_000_000, 2_300_000_000, 2_400_000_000]}
requests = [{**request, "response_outputs": answers}]
found = {"experiments": [{"requests": requests, "window_boundaries": [1_000_000_000]}]}
open(sys.argv[sys.argv.index("--profile-export-file") + 1], "w").write(json.dumps(found))
"""


def test_an_answer_of_two_tokens_counts_as_two(tmp_path: Path) -> None:
    (request,) = generator(tmp_path, EXPORT).window("127.0.0.1:1", "m", ["x"], 4, 1, 1.0)
    assert request.sent_s == 1 and request.answered_s == pytest.approx((0.1, 0.3, 0.4)) and request.tokens == (1, 3, 4)
    assert inter_token_s(request) == pytest.approx(0.3 / 3)


@pytest.mark.parametrize(
    ("code", "tokens", "words"),
    [
        (EXPORT, 5, "answered 4 of 5 tokens"),
        ("print('error: connection refused'); sys.exit(1)", 4, "measured nothing (error: connection refused)"),
        ("sys.exit(3)", 4, "measured nothing (3)"),
    ],
)
def test_a_server_that_fails_is_one_line(tmp_path: Path, code: str, tokens: int, words: str) -> None:
    with pytest.raises(RunError, match=r"m on 127.0.0.1:1: ") as caught:
        generator(tmp_path, code).window("127.0.0.1:1", "m", ["x"], tokens, 1, 1.0)
    assert words in str(caught.value)


def test_load_does_not_go_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC heeds one for loopback addresses too."""
    for name in ("http_proxy", "HTTPS_PROXY", "grpc_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code = "import os; print('error:', sorted(n for n in os.environ if n.lower().endswith('proxy'))); sys.exit(1)"
    with pytest.raises(RunError, match=r"measured nothing \(error: \[\]\)"):
        generator(tmp_path, code).window("127.0.0.1:1", "m", ["x"], 4, 1, 1.0)


def test_a_server_that_never_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PATIENCE_S", 0.2)
    with pytest.raises(RunError, match=r"m on 127\.0\.0\.1:1: perf_analyzer was not done after 0 s"):
        generator(tmp_path, "import time; time.sleep(60)").window("127.0.0.1:1", "m", ["x"], 4, 1, 0.1)


def test_a_window_in_which_nothing_ends_is_empty(tmp_path: Path) -> None:
    code = "print('No valid requests recorded within time interval. Please use a larger time window.'); sys.exit(99)"
    assert generator(tmp_path, code).window("127.0.0.1:1", "m", ["x"], 4, 1, 1.0) == ()


@pytest.mark.parametrize("tokens", [2, 7, 128])
def test_prompts_have_as_many_tokens_as_asked_for(tmp_path: Path, tokens: int) -> None:
    save_tiny("llama", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompts = prompts_of(tokenizer, tokens, 8)
    assert [len(tokenizer.encode(prompt).ids) for prompt in prompts] == [tokens] * 8
    assert len(set(prompts)) == 8 or tokens < 4
    assert json.loads(json.dumps(prompts)) == prompts
