"""What check, compare and baseline refuse and say, as far as nothing has to be measured for it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.samples import MADE_UP_QUALITY, made_up, made_up_report
from trsp_deploy import cli
from trsp_deploy.artifacts import provenance, write_json, writing
from trsp_deploy.artifacts.storage import place_to_write
from trsp_deploy.cli.tables import print_report
from trsp_deploy.cli.terminal import lasting_streams, plain_table
from trsp_deploy.errors import BaselineError, RecipeError, StorageError
from trsp_deploy.recipe import BenchSettings
from trsp_deploy.stages.bench import check_positions, pair_notes
from trsp_deploy.tools.judging.comparisons import compare, notes
from trsp_deploy.tools.judging.statistics import Ratio
from trsp_deploy.tools.judging.verdicts import Requirement, judge
from trsp_deploy.tools.measuring.subjects import Subject
from trsp_deploy.tools.reports import baselines, ci
from trsp_deploy.tools.reports.baselines import (
    Baseline,
    Cut,
    check_machine,
    check_model,
    engine_baseline,
    other_hardware,
    other_versions,
    read_baseline,
    speedups_of,
    this_machine,
    weaknesses,
)

CUT = Cut(name="tiny", num_layers_dense=6, num_layers_pruned=4)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["check", "run", "--min-speedup", "1.1", "--min-speedup", "end-to-end=1.3"],
            "--min-speedup '1.1' and 'end-to-end=1.3': are of the same phase",
        ),
        (
            ["compare", "run", "--min-speedup", "decode=1.3", "--min-speedup", "decode=1.1"],
            "--min-speedup 'decode=1.3' and 'decode=1.1': are of the same phase",
        ),
        (["check", "run", "--max-latency-regression", "300%"], "expected a share of at least 0% and below 100%"),
        (["check", "run", "--quality-budget", "0.99"], "expected the share of quality to keep, 50% to 100%"),
        (["check", "run", "--min-speedup", "1", "--out", "/proc/x.json"], "Invalid value for '--out': /proc/x.json: "),
        (["baseline", "run", "--out", "/dev/null"], "Invalid value for '--out': /dev/null: is a pipe or device"),
        (
            ["evaluate", "run", "--eval", "a/b=text.txt"],
            "--eval 'a/b=text.txt': 'a/b' cannot be a text's name; valid: ",
        ),
        (["evaluate", "run", "--eval", f"{'語' * 34}=text.txt"], "cannot be a text's name; valid: "),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1


# -- files that a user names -------------------------------------------------------------------------------------------


def test_a_link_to_a_file_is_written_through(tmp_path: Path) -> None:
    link, file = tmp_path / "link.json", tmp_path / "file.json"
    link.symlink_to(file.name)
    write_json(place_to_write(link), {"a": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"a": 1}
    assert place_to_write(file) == file and sorted(tmp_path.iterdir()) == [file, link], "a trial leaves nothing"
    assert place_to_write(tmp_path / "new" / "file.json") and not (tmp_path / "new").exists()


def test_what_no_file_can_take_the_place_of(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    wrong = {
        "pipe": "is a pipe or device",
        "loop": "loop",
        "file/x": "file is no folder",
        ".": "is a folder",
        "x" * 250: "cannot be written",
    }
    for name, words in wrong.items():
        with pytest.raises(StorageError, match=words):
            place_to_write(tmp_path / name)
    with pytest.raises(StorageError, match="is a pipe or device"), writing(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("below", ["file/x.json", "file/more/x.json"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="its folder cannot be made"), writing(tmp_path / below):
        pass


def test_streams_without_a_reader_end_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone, contextlib.redirect_stdout(gone):
        with lasting_streams():
            Console(file=sys.stdout).print("rich would exit with 1")
            print("here")
        gone.write("more")  # what a process still holds when it ends


def test_streams_whose_terminal_was_closed_end_nothing() -> None:
    """A job in the background, `disown`ed: its writes fail by another number than a pipe's."""
    ours, theirs = pty.openpty()
    os.close(ours)
    with os.fdopen(theirs, "w") as gone, contextlib.redirect_stdout(gone):
        with lasting_streams():
            Console(file=sys.stdout).print("rich would raise it")
            print("here")
        gone.write("more")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_whose_disk_takes_no_more_is_no_reader_that_left(number: int, tmp_path: Path) -> None:
    class Refused(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(number, os.strerror(number))

        def fileno(self) -> int:
            return log.fileno()

    with (
        (tmp_path / "log").open("w") as log,
        contextlib.redirect_stdout(Refused()),
        pytest.raises(OSError, match=os.strerror(number)),
        lasting_streams(),
    ):
        print("here")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_whose_disk_is_full_costs_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    """A scheduler's, of stderr: it ended jobs of days, and what they had found was not said."""
    with Path("/dev/full").open("w") as log:
        with contextlib.redirect_stderr(log), lasting_streams():
            print("how far the work is", file=sys.stderr, flush=True)
            print("the result")
        log.write("more")  # what a process still holds when it ends
    assert capfd.readouterr().out == "the result\n"


def test_a_summary_shows_what_misses_the_bound() -> None:
    """Its table said "at most 1.001 | 1.001 (1.001 to 1.001)" of a failure."""
    wanted = Requirement(name="ppl wiki", sense="at most", bound=1 / 0.999, source="--quality-budget")
    outcome = judge(wanted, Ratio(ratio=1.00125, low=1.0011, high=1.0014))
    said = ci.step_summary("e", outcome.word, [outcome], [])
    assert outcome.word == "fail" and "| at most 1.001 | 1.0012 (1.0011 to 1.0014)" in said


def test_an_error_in_ci_is_valid_xml() -> None:
    root = ElementTree.fromstring(ci.junit_of_error("no \x1b[1mengine\ud800 <x>").split("?>", 1)[1])
    error = root.find("./testsuite/testcase/error")
    assert error is not None and error.get("message") == "no ?[1mengine? <x>"
    broken = Ratio(ratio=1, low=1, high=1)
    outcome = judge(Requirement(name="x", sense="at least", bound=2, source="a file"), broken, "other\x1b work")
    ElementTree.fromstring(ci.junit("e", [outcome], 1.0).split("?>", 1)[1])
    assert ci.github_error("a\nb") == "::error title=trsp-deploy check::a%0Ab"


# -- baselines ---------------------------------------------------------------------------------------------------------


def made_baseline(**changes: Any) -> dict[str, Any]:
    """A baseline's values, without its seal."""
    engines = {"e": engine_baseline(made_up(replicates=6), {"text": MADE_UP_QUALITY})}
    whole = Baseline(schema_version=1, machine=this_machine(), model=CUT, engines=engines, provenance=provenance())
    return {**whole.model_dump(mode="json"), **changes}


def read(values: dict[str, Any], path: Path) -> Baseline:
    path.write_text(json.dumps(values))
    return read_baseline(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    values = made_baseline()
    values["engines"]["e"]["latency"][0]["total"][0] = value
    with pytest.raises(BaselineError, match=r"engines\.e\.latency\.0\.total\.0: expected a finite number, got"):
        read(values, tmp_path / "b.json")


def test_figures_that_nothing_can_be_held_against(tmp_path: Path) -> None:
    values = made_baseline()
    values["engines"]["e"]["speedup"][0]["decode"][1] = 1e4
    with pytest.raises(BaselineError, match=r"speedup\.0\.decode\.1: expected a logarithm within"):
        read(values, tmp_path / "b.json")
    for figure in (math.nan, 0.0, -2.0):
        values = made_baseline()
        values["engines"]["e"]["quality"]["text"]["dense_ppl"] = figure
        with pytest.raises(BaselineError, match=r"quality\.text\.dense_ppl: expected a finite number above 0"):
            read(values, tmp_path / "b.json")
    with pytest.raises(BaselineError, match="engines: holds none"):
        read(made_baseline(engines={}), tmp_path / "b.json")
    with pytest.raises(BaselineError, match="is no baseline, for it has no `engines`"):
        read(made_baseline(engines=[]), tmp_path / "b.json")


def test_a_baseline_is_of_a_model(tmp_path: Path) -> None:
    found, path = read(made_baseline(), tmp_path / "b.json"), tmp_path / "b.json"
    assert check_model(found, path, CUT) == []
    other = CUT.model_copy(update={"name": "other"})
    assert check_model(found, path, other) == ["the baseline is of tiny, this run of other"]
    words = "is of tiny with 6 layers cut to 4, and this run is of tiny with 7 layers cut to 4"
    with pytest.raises(BaselineError, match=re.escape(words)):
        check_model(found, path, CUT.model_copy(update={"num_layers_dense": 7}))
    older = made_baseline()
    del older["model"]
    assert "does not say of which model" in check_model(read(older, path), path, CUT)[0]


def test_another_toolkit_and_another_python_are_noted(tmp_path: Path) -> None:
    values = made_baseline()
    assert other_versions(read(values, tmp_path / "b.json")) == []
    values["provenance"] |= {"trsp_deploy": "0.0.1", "python": "3.9.0", "cpu": "another"}
    lines = other_versions(read(values, tmp_path / "b.json"))
    assert [line.partition(" in the baseline, ")[0] for line in lines] == ["trsp_deploy 0.0.1", "Python 3.9.0"]


def test_processors_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 products take twice as long without VNNI, and both kinds may call themselves "AMD EPYC"."""
    found, path = read(made_baseline(), tmp_path / "b.json"), tmp_path / "b.json"
    check_machine(found, path, "--max-latency-regression")
    assert other_hardware(found) == []
    monkeypatch.setattr(baselines, "instruction_sets", lambda: ("avx2",))
    with pytest.raises(BaselineError, match=r"was made on other hardware; there: .*; here: .* \(avx2\), "):
        check_machine(found, path, "--max-latency-regression")
    assert " (avx2), " in other_hardware(found)[0]
    older = made_baseline()
    del older["machine"]["instructions"]
    check_machine(read(older, path), path, "--max-latency-regression")


def test_a_baseline_of_few_replicates_says_so() -> None:
    many, few = (engine_baseline(made_up(speedup=2, replicates=count), {}) for count in (5, 4))
    assert weaknesses(many) == []
    assert weaknesses(few)[0].startswith("the baseline has 4 replicates, 5 are the fewest that decide")
    ((case, found),) = speedups_of(many)
    without = engine_baseline(made_up(control=False), {})
    assert without.control == () and weaknesses(without)[0].startswith("the baseline has no control")
    assert case.new_tokens == 4 and found.low <= 2 <= found.high


def test_a_baseline_keeps_the_control_and_an_older_one_has_none(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    made = read(made_baseline(), path).engines["e"]
    assert len(made.control[0]["total"]) == 6
    older = made_baseline()
    del older["engines"]["e"]["control"]
    assert read(older, path).engines["e"].control == ()
    short = made_baseline()
    short["engines"]["e"]["control"][0]["decode"] = []
    with pytest.raises(BaselineError, match="`control` needs two samples or more"):
        read(short, path)
    infinite = made_baseline()
    infinite["engines"]["e"]["control"][0]["decode"][0] = math.inf
    with pytest.raises(BaselineError, match=r"control\.0\.decode\.0: expected a finite number"):
        read(infinite, path)


# -- comparisons -------------------------------------------------------------------------------------------------------


def test_the_noise_floor_is_of_one_phase_and_a_percentage() -> None:
    found = compare(made_up(noise=0.1))
    floor = found.of("total").noise_floor
    assert floor is not None and floor > 0.01
    (line,) = [line for line in notes(found) if line.startswith("control")]
    assert line.endswith(f"; end to end, differences below {math.expm1(floor):.1%} cannot be told from none")
    assert "(--budget, or in a run's recipe bench.budget_s)" in notes(compare(made_up(replicates=3)))[1]


def test_a_pair_that_is_no_model_and_its_cut() -> None:
    one = Subject(path=Path("a"), spec=None, vocabulary=9, cuts_logits=False, size=None, architecture="opt")
    other = Subject(path=Path("b"), spec=None, vocabulary=8, cuts_logits=False, size=None, architecture="llama")
    assert pair_notes(one, other)[:-1] == [
        "two architectures, opt and llama: not a model and its cut",
        "two vocabularies, of 9 and 8 tokens: not a model and its cut",
    ]
    (line,) = pair_notes(one, one)
    assert line.startswith("no limit of the speed-up is known: a is a graph alone")


def test_prompt_and_new_tokens_count_together() -> None:
    settings = BenchSettings(prompt_tokens=(16, 240), new_tokens=16)
    check_positions(settings, 256, "m")
    check_positions(settings, None, "m")
    with pytest.raises(RecipeError, match="prompt_tokens 240 and new_tokens 16: m has 255 positions"):
        check_positions(settings, 255, "m")


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_cuts_no_name_or_figure_short(width: int) -> None:
    text = io.StringIO()
    figures = ["1234.5 ms"] * 6
    rows = [(name, *figures) for name in ("ort-cpu-int4", "ort-cpu-int4-accurate", "ort-cpu-int8")]
    Console(file=text, width=width).print(plain_table(("engine", *map(str, range(6))), rows))
    assert "…" not in text.getvalue()


def test_a_folder_in_brackets_is_no_markup() -> None:
    text = io.StringIO()
    print_report(made_up_report(made_up()), Path("runs/[/x] llama[v2]"), text)
    assert "report: runs/[/x] llama[v2]/report.html" in text.getvalue()
