"""The report's page, tables and verdict, and the price that they name."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.breadth import BREADTH
from tests.samples import by_documents, made_up, made_up_report, made_up_sweep, scores
from trsp_deploy.artifacts import provenance
from trsp_deploy.cli.tables import print_comparison, print_report
from trsp_deploy.cli.terminal import Output
from trsp_deploy.errors import TextError
from trsp_deploy.reading import read_record
from trsp_deploy.results import Perplexity
from trsp_deploy.stages.report import summary, write_report
from trsp_deploy.tools.judging import comparisons
from trsp_deploy.tools.judging.statistics import Ratio
from trsp_deploy.tools.plan import Pick
from trsp_deploy.tools.reports import html, markdown, plots
from trsp_deploy.tools.reports.measured import measured_by
from trsp_deploy.tools.reports.quality import (
    ChoicesReport,
    Price,
    QualityReport,
    budget_text,
    choices_report,
    quality_report,
)
from trsp_deploy.tools.reports.record import Report, verdict
from trsp_deploy.tools.reports.rows import (
    comparison_rows,
    engine_notes,
    engine_rows,
    machine_rows,
    model_rows,
    provenance_rows,
    sweep_rows,
)
from trsp_deploy.tools.reports.texts import text_report
from trsp_deploy.tools.sources.texts import Texts
from trsp_deploy.tools.sources.windows import Extent


def test_headlines_are_of_the_least_of_several_shapes_and_name_it() -> None:
    made = made_up(speedup=1.5, shapes=(1.0, 0.8, 0.9))
    report = made_up_report(made)
    found = report.engines[0].comparison
    assert found is not None and found.headline.prompt_tokens == 256
    assert found.of("total").speedup.ratio == pytest.approx(1.2, rel=0.01)
    where = "at batch 1, prompt 256, the least of 3 shapes"
    assert f"CONFIRMED on ort-cpu-fp32 {where}: end to end 1.20x (" in report.verdict
    assert any(f"end to end, {where}" in note or f"end to end {where}" in note for note in comparisons.notes(found))
    page = html.render(report, {"ort-cpu-fp32": made})
    assert f"Faster: ort-cpu-fp32 ({where}) generates 1.20 times as fast" in page
    assert f"<b>1.20x</b><span>end to end {where}, of 1.40x possible</span>" in page
    assert "<span>each new token at batch 1, prompt 256, of 1.40x possible</span>" in page, "the least by end to end"
    assert "Every block at batch 1, prompt 256." in page and f"The band is the interval {where}." in page
    drawn = plots.samples(made, 1)
    assert drawn in page and drawn != plots.samples(made, 0)
    assert "rate, batch 1, prompt 256" in [row[0] for row in comparison_rows(found)]


@pytest.mark.parametrize("more", [0, 1, -1])
def test_gates_of_another_number_of_layers_are_no_bars(more: int) -> None:
    """Of a plan that was adapted by hand: the page was an IndexError after all the work, at every rerun."""
    made = made_up()
    report = made_up_report(made)
    length = report.plan.num_layers + more
    picked = Pick(layer=report.plan.dropped[0], lm_loss=(3.0,), gates=((0.5,) * length,), removal_loss={})
    plan = report.plan.model_copy(update={"picks": (picked,)})
    page = html.render(report.model_copy(update={"plan": plan}), {"ort-cpu-fp32": made})
    assert ("Bars are the gates that were learned" in page) == (more == 0)


def test_a_model_that_a_cut_has_broken_has_a_report() -> None:
    """Losses whose perplexity is beyond a float."""
    made = made_up(speedup=1.3)
    for dense, broken in ([by_documents([3.0] * 30), by_documents([800.0] * 30)], [windows(3.0), windows(800.0)]):
        found = quality_report(dense, broken)
        assert found.ratio == math.inf and found.pruned_ppl == math.inf
        report = made_up_report(made).model_copy(update={"quality": {"text": found}})
        assert "infx" in markdown.render(report) and "infx" in html.render(report, {"ort-cpu-fp32": made})
        assert budget_text(Price(None, {"text": found})).startswith("99.0% not kept, 99.9% not kept")


@BREADTH
def test_what_is_infinite_is_said_in_json_that_every_reader_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Infinity` alone is none, and null, as the page's own copy had it, is another number."""
    made, broken = made_up(), windows(800.0)
    report = made_up_report(made).model_copy(update={"quality": {"text": quality_report(windows(3.0), broken)}})
    write_report(report, {"ort-cpu-fp32": made}, tmp_path, {"evaluate-text-pruned": broken})
    Output(as_json=True).result(summary(report, tmp_path))
    page = (tmp_path / "report.html").read_text()
    copy = base64.b64decode(page.partition('href="data:application/json;base64,')[2].partition('"')[0])
    for text in ((tmp_path / "report.json").read_text(), copy, capsys.readouterr().out):
        assert strict_json(text)["quality"]["text"]["pruned_ppl"] == "Infinity"
    assert Report.model_validate_json(copy) == report == read_record(tmp_path / "report.json", Report, TextError)


def strict_json(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def windows(nll: float) -> Perplexity:
    return Perplexity(text="t", role="dense", origin="", context_length=11, nll=(nll,) * 30)


def test_both_pages_say_what_their_marks_and_intervals_are() -> None:
    """Markdown had the mark without a word of it, and intervals as wide as an earlier rule made them."""
    made = made_up(speedup=1.5)  # its limit is 1.4
    report = made_up_report(made)
    for page in (markdown.render(report), html.render(report, {"ort-cpu-fp32": made}).replace("&#39;", "'")):
        assert " (!)" in page and "(!) above its limit: a measurement to distrust." in page
        assert "never narrower than the control is off on average" in page


def test_the_page_names_all_that_leaves_a_difference_open() -> None:
    """Of intervals that exclude 1, within what dense differs by from itself, it said that one leaves none possible."""
    made = made_up(speedup=1.05, noise=0.001)
    report = made_up_report(made)
    engine = report.engines[0]
    assert engine.comparison is not None and all(phase.speedup.low > 1 for phase in engine.comparison.phases)
    open_still = engine.comparison.model_copy(update={"claim": "INCONCLUSIVE"})
    changed = report.model_copy(update={"engines": (engine.model_copy(update={"comparison": open_still}),)})
    assert (
        "Not decided: ort-cpu-fp32 generates 1.05 times as fast (1.05 to 1.05), but for a phase its interval, or what "
        "dense shows against itself, leaves no difference possible." in html.render(changed, {"ort-cpu-fp32": made})
    )


def test_one_shape_needs_no_name() -> None:
    report = made_up_report(made_up(speedup=1.25))
    assert "shapes" not in report.verdict and "CONFIRMED on ort-cpu-fp32: end to end 1.2" in report.verdict


def test_the_page_carries_what_quality_is_derived_from() -> None:
    made, score = made_up(), scores("1101")
    answers = {"evaluate-text-dense": by_documents([1.0, 2.0]), "zero-shot-ort-cpu-fp32-dense": score}
    page = html.render(made_up_report(made), {"ort-cpu-fp32": made}, answers)
    data = page.partition('download="quality.json.gz" href="data:application/gzip;base64,')[2].partition('"')[0]
    kept = json.loads(gzip.decompress(base64.b64decode(data)))
    assert Perplexity.model_validate(kept["evaluate-text-dense"]) == answers["evaluate-text-dense"]
    assert kept["zero-shot-ort-cpu-fp32-dense"]["tasks"][0]["correct"] == [True, True, False, True]


def test_the_page_carries_no_place_of_this_machine() -> None:
    """Its download had the path of the evaluation text, which the page itself shows by name alone."""
    made, read = made_up(), by_documents([1.0, 2.0]).model_copy(update={"origin": "/home/alice/secret/held.txt"})
    page = html.render(made_up_report(made), {"ort-cpu-fp32": made}, {"evaluate-text-dense": read})
    packed = re.findall(r'href="data:application/gzip;base64,([^"]+)"', page)
    kept = "".join(gzip.decompress(base64.b64decode(data)).decode() for data in packed)
    assert "alice" not in kept and '"origin":"held.txt"' in kept


def budgets(quality: dict[str, QualityReport]) -> str:
    return budget_text(Price("e", quality))


def test_the_report_says_plainly_that_a_budget_is_not_kept() -> None:
    text = made_up_report(made_up()).quality["text"]
    assert budgets({"a": text}).startswith("99.0% not kept, 99.9% not kept (worst text 1.50x")
    close = text.model_copy(update={"ratio": 1.0, "ratio_low": 0.999, "ratio_high": 1.005})
    assert budgets({"a": close}).startswith("99.0% kept, 99.9% not decided")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.74, "(worst text 1.74x; they allow 1.01x and 1.001x)"),
        (1.0049, "99.0% kept, 99.9% not kept (worst text 1.005x; they allow 1.01x and 1.001x)"),
        (1.00104, "99.0% kept, 99.9% not kept (worst text 1.00104x; they allow 1.0101x and 1.001x)"),
        (1.01007, "99.0% kept, 99.9% not kept (worst text 1.01007x; they allow 1.0101x and 1.001x)"),
        (math.inf, "(worst text infx; they allow 1.01x and 1.001x)"),
    ],
)
def test_a_ratio_is_told_from_what_the_budgets_allow(ratio: float, words: str) -> None:
    """A budget of 1.001x was not kept by "1.00x"."""
    text = made_up_report(made_up()).quality["text"]
    found = text.model_copy(update={"ratio": ratio, "ratio_low": ratio, "ratio_high": ratio})
    assert budgets({"a": found}).endswith(words)


def test_a_budget_that_an_interval_reaches_across_is_open_whichever_side_the_estimate_is() -> None:
    """1.0101x is allowed, and 99% of the accuracy asked for."""
    text = made_up_report(made_up()).quality["text"]
    for ratio in (1.005, 1.02):
        found = text.model_copy(update={"ratio": ratio, "ratio_low": 1.002, "ratio_high": 1.03})
        assert budgets({"a": found}).startswith("99.0% not decided, 99.9% not kept (")
    sure = choices_report(scores("1" * 400), scores("1" * 400))
    for ratio in (0.985, 0.995):
        kept = Ratio(ratio=ratio, low=0.98, high=0.998)
        price = Price("e", {}, sure.model_copy(update={"retained": kept}))
        assert budget_text(price).startswith("99.0% not decided, 99.9% not kept (")


def test_a_budget_is_of_accuracy_too() -> None:
    text = made_up_report(made_up()).quality["text"].model_copy(update={"ratio": 1, "ratio_low": 1, "ratio_high": 1})
    half, all_right = scores("10" * 200), scores("1" * 400)
    lost = choices_report(all_right, half)
    assert budget_text(Price("e", {"a": text}, lost)) == (
        "99.0% not kept, 99.9% not kept (worst text 1.000x; they allow 1.01x and 1.001x; accuracy 50.0% retained)"
    )
    assert budget_text(Price("e", {}, lost)).startswith("99.0% not kept, 99.9% not kept (accuracy 50.0% retained)")
    alike = choices_report(all_right, all_right)  # of 400 items that all were kept, one in a thousand may be lost
    assert budget_text(Price("e", {}, alike)).startswith("99.0% kept, 99.9% not decided (accuracy 100")
    few = choices_report(scores("10"), scores("10"))
    assert budget_text(Price("e", {}, few)).startswith("99.0% not decided")
    thin = choices_report(*[scores("1" * 100, "1" * 9)] * 2)
    assert "9 items of t1, 10 of each task are the fewest that decide" in thin.doubt
    assert not choices_report(*[scores("1" * 100, "1" * 10)] * 2).doubt
    assert budget_text(Price(None, {})) == "neither a text nor a task was evaluated"
    assert budget_text(Price("e", {"a": text}), ["piqa"]) == (
        "99.0% not decided, 99.9% not decided (worst text 1.000x; they allow 1.01x and 1.001x; not measured: piqa)"
    )
    assert budget_text(Price("e", {"a": text}, lost), ["b"]).startswith("99.0% not kept, 99.9% not kept")


def test_a_text_or_tasks_too_short_to_decide_are_said_to_be_wherever_their_figures_are() -> None:
    """One window of text has an interval of no width, which looked like certainty."""
    made, words = made_up(speedup=1.25), "1 window of 2048 tokens, 5 are the fewest that decide"
    whole = made_up_report(made)
    one = whole.quality["text"].model_copy(
        update={"ratio": 1.02, "ratio_low": 1.02, "ratio_high": 1.02, "tokens": 2047, "context_length": 2048}
    )
    short, few = {"text": one.model_copy(update={"pairs": "windows"})}, choices_report(scores("10"), scores("10"))
    engines = (whole.engines[0].model_copy(update={"quality": short, "choices": few}),)
    judged = {"quality": short, "engines": engines, "verdict": verdict(list(engines), short)}
    report = whole.model_copy(update=judged)
    assert f"1.02x on text ({words})." in report.verdict
    assert "100.0% of dense's (2 items, 50 are the fewest that decide)." in report.verdict
    rows = dict(model_rows(report))
    assert rows["perplexity on text, PyTorch"].endswith(f"1.02x (1.02 to 1.02; 2,047 tokens; {words})")
    cells = {row[2]: row[5] for row in engine_rows(report)}
    assert cells["ppl on text"] == f"1.02x (1.02 to 1.02; {words})"
    assert cells["accuracy retained"].endswith("; 2 items, 50 are the fewest that decide)")
    page = html.render(report, {"ort-cpu-fp32": made})
    assert f"up by 2% on text ({words})" in page, "the headline"
    assert f"<b>1.02x</b><span>perplexity on text ({words})</span>" in page
    assert "of accuracy retained (2 items, 50 are the fewest that decide)</span>" in page
    assert markdown.render(report).count(words) >= 3
    points = tuple(point.model_copy(update={"quality": short}) for point in made_up_sweep().points)
    assert all(words in row[2] for row in sweep_rows(made_up_sweep().model_copy(update={"points": points})))
    assert "fewest that decide" not in markdown.render(whole) + html.render(whole, {"ort-cpu-fp32": made})


def test_the_price_is_the_engines_and_pytorchs_only_where_no_engine_read() -> None:
    made = made_up(speedup=1.25)
    report = made_up_report(made)
    near = report.quality["text"].model_copy(update={"ratio": 1.005, "ratio_low": 1.004, "ratio_high": 1.006})
    far = near.model_copy(update={"ratio": 3.0, "ratio_low": 2.9, "ratio_high": 3.1, "pruned_ppl": 30.0})
    ran, absent = report.engines
    engines = (ran.model_copy(update={"quality": {"text": far}}), absent)
    quality = {"text": near, "long": near}
    judged = report.model_copy(
        update={"quality": quality, "engines": engines, "verdict": verdict(list(engines), quality)}
    )
    assert "Perplexity through ort-cpu-fp32: 3.00x on text." in judged.verdict
    assert "Perplexity in PyTorch and through no engine: 1.00x on long." in judged.verdict
    rows = dict(model_rows(judged))
    assert rows["quality budgets, ort-cpu-fp32"].startswith("99.0% not kept")
    assert rows["quality budgets, PyTorch"].startswith("99.0% kept")
    assert "ort-cpu-fp32: its perplexity on long is not measured" in engine_notes(judged)
    timed = "timed: batch 1, prompt 128; end to end with 4 new tokens"
    assert engine_notes(judged)[0] == f"ort-cpu-fp32: {timed}" and f"- ort-cpu-fp32: {timed}\n" in markdown.render(
        judged
    )
    assert timed in html.render(judged, {"ort-cpu-fp32": made}), "a speed-up of no shape says nothing"
    page = html.render(judged, {"ort-cpu-fp32": made})
    assert "its perplexity on long is not measured" in page
    assert "The price through ort-cpu-fp32: perplexity (how surprised the model is by held-out text) up by 200%" in page
    assert "<b>3.00x</b><span>perplexity on text</span>" in page and "<b>1.00x</b>" not in page
    none_ran = judged.model_copy(update={"engines": (absent,), "verdict": verdict([absent], quality)})
    assert "Perplexity in PyTorch and through no engine: 1.00x on text, 1.00x on long." in none_ran.verdict
    page = html.render(none_ran, {})
    assert "The price in PyTorch and through no engine: perplexity" in page
    assert "<b>1.00x</b><span>perplexity on text, PyTorch</span>" in page


def test_pages_say_when_and_with_what_figures_were_taken() -> None:
    made = made_up()
    report = made_up_report(made)
    rows = dict(provenance_rows(report))
    assert rows["measured"] == "2025-12-01T10:00:00Z to 2026-01-01T10:00:00Z" and rows["written"] > rows["measured"]
    assert rows["measured otherwise"] == "torch 2.8.0 (now 2.9.0): bench-ort-cpu-fp32"
    for page in (html.render(report, {"ort-cpu-fp32": made}), markdown.render(report)):
        assert "torch 2.8.0 (now 2.9.0)" in page and rows["written"] in page
    on_gpu = report.provenance.model_copy(update={"gpus": ("NVIDIA X",), "driver": "580.1"})
    assert dict(machine_rows(on_gpu, ""))["GPU"] == "NVIDIA X, driver 580.1"


def test_clocks_are_told_once_wherever_a_comparison_is() -> None:
    made = made_up()
    report = made_up_report(made)
    found = report.engines[0].comparison
    assert found is not None
    terminal, compared = io.StringIO(), io.StringIO()
    print_report(report, Path("run"), terminal)
    print_comparison("e", found, {}, compared)
    pages = (markdown.render(report), html.render(report, {"ort-cpu-fp32": made}))
    for text in (*pages, terminal.getvalue(), compared.getvalue()):
        assert text.count("clock 2.60 GHz") == 1


def test_what_was_measured_otherwise_is_found() -> None:
    now = provenance()
    then = now.model_copy(update={"trsp_deploy": "0.0.1", "time": "2025-01-01T00:00:00Z", "python": "3.9.0"})
    then = then.model_copy(update={"packages": {**then.packages, "numpy": "1.0"}, "driver": "1.2"})
    found = {each.step: each for each in measured_by({"bench-e": then, "evaluate-t-dense": now, "prune": then}, now)}
    assert found.keys() == {"bench-e", "evaluate-t-dense"} and found["evaluate-t-dense"].differs == {}
    assert found["bench-e"].differs == {
        "trsp_deploy": ("0.0.1", now.trsp_deploy),
        "Python": ("3.9.0", now.python),
        "numpy": ("1.0", now.packages["numpy"]),
        "driver": ("1.2", now.driver or "none"),
    }
    with_task_library = now.model_copy(update={"packages": {**now.packages, "lm-eval": "0.4"}, "driver": "1.2"})
    without = {name: version for name, version in now.packages.items() if name != "lm-eval"}
    older = now.model_copy(update={"time": None, "driver": None, "packages": without})
    assert older.differences(with_task_library) == {}, "what was not looked up then is no difference"


def test_accuracy_alone_has_a_price_too() -> None:
    made = made_up(speedup=1.25)
    report = made_up_report(made)
    choices = choices_report(scores("1" * 100), scores("1" * 90 + "0" * 10))
    engines = (report.engines[0].model_copy(update={"quality": {}, "choices": choices}),)
    asked = report.model_copy(update={"quality": {}, "engines": engines, "verdict": verdict(list(engines), {})})
    assert asked.verdict.endswith("Accuracy through ort-cpu-fp32: 90.0% of dense's.")
    assert dict(model_rows(asked))["quality budgets, ort-cpu-fp32"].startswith("99.0% not kept")
    page = html.render(asked, {"ort-cpu-fp32": made})
    assert "The price through ort-cpu-fp32: 90.0% of dense" in page and "<b>90.0%</b><span>of accuracy retained" in page


def test_accuracy_is_on_the_pages_and_a_run_without_texts_says_nothing_of_them() -> None:
    report = made_up_report(made_up())
    choices = choices_report(scores("1110", "1011"), scores("0110", "1010"))
    engines = tuple(each.model_copy(update={"choices": choices}) for each in report.engines)
    rows = engine_rows(report.model_copy(update={"engines": engines}))
    assert any(row[2] == "accuracy (acc), t0" and row[3] == "75.0%" and "1 of 4 lost" in row[5] for row in rows)
    assert any(row[2] == "accuracy retained" for row in rows)
    older = {name: task.model_dump(exclude={"cut"}) for name, task in choices.tasks.items()}
    assert ChoicesReport.model_validate({**dict(choices), "tasks": older}) == choices and choices.cut == []
    assert ("", "", "ppl on text to PyTorch", "1.0000x", "1.0012x", "within 0.5%", "", "") in rows
    unread = [each.model_copy(update={"quality": {}}) for each in engines]
    assert "Perplexity" not in verdict(unread, {})


def test_accuracy_that_was_asked_for_and_has_no_figure_is_said() -> None:
    """As of items that are longer than the engine reads: the report of such a run did not mention the tasks."""
    made = made_up(speedup=1.25)
    report = made_up_report(made)
    recipe = report.recipe.model_copy(
        update={"evaluate": report.recipe.evaluate.model_copy(update={"tasks": ("piqa", "copa")})}
    )
    asked = report.model_copy(update={"recipe": recipe})
    words = "its accuracy on piqa, copa is not measured, or dense has none to retain"
    for page in (html.render(asked, {"ort-cpu-fp32": made}), markdown.render(asked), *engine_notes(asked)[-2:-1]):
        assert words in page
    assert not any("accuracy" in note for note in engine_notes(report))
    assert dict(model_rows(asked))["quality budgets, ort-cpu-fp32"].endswith("not measured: piqa, copa)")
    same = report.quality["text"].model_copy(update={"ratio": 1, "ratio_low": 1, "ratio_high": 1})
    in_pytorch = {"quality": {"text": same}, "engines": (report.engines[0].model_copy(update={"quality": {}}),)}
    rows = dict(model_rows(asked.model_copy(update=in_pytorch)))
    assert rows["quality budgets, PyTorch"].startswith("99.0% not decided"), "an engine ran, and answered no task"
    assert rows["quality budgets, PyTorch"].endswith("not measured: piqa, copa)")
    choices = choices_report(scores("1" * 100), scores("1" * 90 + "0" * 10))
    ran, other = (report.engines[0].model_copy(update={"name": name, "quality": {}}) for name in ("a", "b"))
    two = asked.model_copy(update={"engines": (ran, other.model_copy(update={"choices": choices})), "quality": {}})
    page = html.render(two, {"a": made, "b": made})
    assert "<b>90.0%</b><span>of accuracy retained, b</span>" in page


def test_texts_are_told_with_what_identifies_them() -> None:
    made = made_up()
    report = made_up_report(made)
    text = Texts(name="held.txt", origin="/home/alice/held.txt", documents=("a", "b"), fingerprint="f" * 64)
    read = text_report("text", "evaluation", text, Extent(640, bos=False), 0.25)
    learned = text_report("learned.txt", "calibration", text, Extent(9_000, bos=True))
    judged = report.model_copy(update={"texts": (learned, read)})
    note = "evaluation 'text': 25.0% of it stands in the calibration text, and flatters what learned from it"
    assert dict(model_rows(judged))["overlap"] == note
    rows = dict(provenance_rows(judged))
    assert rows["text text"] == f"held.txt; 2 documents, 640 tokens, windows without BOS; SHA-256 {'f' * 64}"
    assert "9,000 tokens, each window after BOS" in rows["calibration text learned.txt"]
    assert note in markdown.render(judged)
    page = html.render(judged, {"ort-cpu-fp32": made})
    assert "f" * 64 in page and note.partition(": ")[2] in page
    older = report.model_dump(mode="json")
    del older["texts"]
    assert Report.model_validate(older) == report and dict(provenance_rows(report))["text text"] == "made up"
    assert "overlap" not in dict(model_rows(report))


def test_items_that_lost_their_beginning_are_told() -> None:
    made = made_up()
    cut, whole = scores("1110"), scores("1011")
    cut = cut.model_copy(update={"tasks": tuple(task.model_copy(update={"cut": 3}) for task in cut.tasks)})
    report = made_up_report(made)
    for found, words in ((cut, "3 of 4 items of t0 are longer than it reads at once"), (whole, "")):
        engines = tuple(each.model_copy(update={"choices": choices_report(found, found)}) for each in report.engines)
        judged = report.model_copy(update={"engines": engines})
        for page in (html.render(judged, {"ort-cpu-fp32": made}), markdown.render(judged)):
            assert words in page and ("lost their beginning" in page) == bool(words)


def test_layers_that_were_edited_by_hand_are_not_called_the_methods() -> None:
    made = made_up()
    report = made_up_report(made)
    edited = report.model_copy(update={"model": report.model.model_copy(update={"layers_edited": True})})
    words = "edited by hand after trsp"
    page = html.render(edited, {"ort-cpu-fp32": made})
    assert f"2 of 8 layers were dropped ({words})." in page
    assert dict(model_rows(edited))["layers"] == f"8 -> 6 (25.0% fewer; dropped 3, 4; {words})"
    assert words in markdown.render(edited)
    assert "by hand" not in html.render(report, {"ort-cpu-fp32": made}) + markdown.render(report)
    older = report.model_dump(mode="json")
    del older["model"]["layers_edited"]
    assert Report.model_validate(older) == report


def test_a_name_with_a_bar_stays_in_its_cell() -> None:
    report = made_up_report(made_up())
    named = report.model_copy(update={"model": report.model.model_copy(update={"name": "a|b"})})
    row = next(line for line in markdown.render(named).splitlines() if line.startswith("| model |"))
    assert row == r"| model | a\|b (LlamaForCausalLM) |"


def test_verdict_without_an_engine_claims_nothing() -> None:
    assert verdict([], {}).startswith("NOT MEASURED")
