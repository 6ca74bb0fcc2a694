"""Generated bad input: recipes, engine specs, plans, baselines and other records, and command lines.

A few of each by default; `make faults` draws 10,000 (`HYPOTHESIS_PROFILE=faults`). Whatever comes: one of the errors in
trsp_deploy/errors.py with a short message or a valid value, soon, and no file outside the run folder.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'trsp_deploy[dev]'")

from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from tests.made_run import made_run, made_sweep
from tests.samples import made_up, made_up_report, made_up_served
from trsp_deploy.artifacts import MANIFEST, RunFolder, provenance
from trsp_deploy.cli import run
from trsp_deploy.cli.app import app
from trsp_deploy.errors import EngineSpecError, RecipeError, TrspError
from trsp_deploy.reading import read_yaml
from trsp_deploy.recipe import Recipe, override, parse_drop, parse_drops, read_bench_settings, read_recipe
from trsp_deploy.tools.delivery.publishing import plan_push
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.library import load_engine_spec, load_recipe_values
from trsp_deploy.tools.model_repository.manifest import RepositoryManifest, ServedModel, read_repository
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.reports.baselines import SCHEMA_VERSION, Baseline, engine_baseline, read_baseline, this_machine
from trsp_deploy.tools.resources.cleaning import plan_cleaning
from trsp_deploy.tools.runners.manifest import read_manifest

LONGEST_S = 20.0  # a hang; the longest of a quiet machine is a hundredth of that
LONGEST_LINE = 20_000  # of an error; the command line cuts it

# -- what is drawn -----------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=40),
    st.sampled_from(
        [
            "",
            " ",
            "-",
            "null",
            "true",
            "25%",
            "a" * 5000,
            "é" * 300,
            "../../etc/passwd",
            "~root",
            "~nobody-here/x.txt",
            "%",
        ]
    ),
    st.sampled_from(["1e999", "nan", "1e309%", "25%%", "25 %", "٣%", "8,8", "1..", ":::", "-0", "٣", "0x10"]),
    st.sampled_from(["9" * 400, "9" * 5000, "1_000", "NaN", "inf", "\ud800", "a\nb", "\x1b[31m"]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, -0.0, float("inf"), float("nan")]),
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
YAML_SNIPPETS = st.sampled_from(
    [
        "2020-13-45",
        "!!python/object/apply:os.system ['true']",
        "!!timestamp 99",
        "!!binary '@'",
        "!!int x",
        "!!float _",
        "&a [*a]",
        "&a {b: *a}",
        "{? [1, 2] : 3}",
        "{[1]: 2}",
        "*nowhere",
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000 + "x",
        "'",
        "\t- x",
        "%YAML 9.9\n---\n",
        "a: 1\n---\nb: 2",
        "a: 1\na: 2",
        "<<: 3",
        "<<: [1, {a: b}]",
        "1:60:60:60",
        "0b2",
        "9" * 5000,
        "- &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"- &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)),
        "\ufeff",
        "\x00",
        '"a\\0b.txt"',
        "key: \x85",
        "&a {x: 1, y: 2}",
        "a: &a {x: 1}\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{','.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(9)),
        "1:" + "59:" * 20_000 + "59",
        "x" * 200_000,
    ]
)
BYTES = st.binary(max_size=200)


def mutated(values: Any) -> st.SearchStrategy[Any]:
    """A valid value with some of its parts replaced by odd ones, taken out, or joined by unknown ones."""
    paths = list(_paths(values))

    @st.composite
    def draw_one(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
        found = copy.deepcopy(values)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths))
            what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it away
                _change(found, path, what, draw)
        return found

    return draw_one()


def _paths(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items)[:30]:
        yield (*before, key)
        yield from _paths(value, (*before, key))


def _change(values: Any, path: tuple[Any, ...], what: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    *parents, last = path
    for part in parents:
        values = values[part]
    if what == "remove":
        del values[last]
    elif what == "add" and isinstance(values, dict):
        values[draw(TEXTS)] = draw(ODD)
    else:
        values[last] = draw(ODD)


def garbled(text: str) -> st.SearchStrategy[bytes]:
    """A valid file's bytes, cut short or with some of them changed."""
    data = text.encode()

    @st.composite
    def draw_one(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
        found = bytearray(data)
        for _ in range(draw(st.integers(0, 6))):
            found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
        return bytes(found[: draw(st.sampled_from([len(found), len(found), draw(st.integers(0, len(found)))]))])

    return draw_one()


def as_file(values: Any) -> bytes:
    """JSON, as Python writes it: NaN, infinities and lone surrogates among it."""
    return json.dumps(values, default=str).encode("utf-8", "surrogatepass")


def yaml_file(values: Any) -> bytes:
    """YAML of what YAML can say."""
    try:
        return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):  # integers of thousands of digits, say
        return repr(values).encode("utf-8", "surrogatepass")


# -- how it is judged --------------------------------------------------------------------------------------------------


class Tally:
    """Counts examples, and holds each to the promise."""

    def __init__(self) -> None:
        self.tried = self.refused = 0
        self.longest_s = 0.0

    def __call__(self, *reads: Callable[[], object]) -> None:
        """One input and what reads it."""
        self.tried += 1
        before = self.refused
        for read in reads:
            self._read(read)
        self.refused = before + (self.refused > before)

    def _read(self, read: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            read()
        except TrspError as problem:
            self.refused += 1
            assert 0 < len(str(problem)) < LONGEST_LINE, f"{len(str(problem))} characters: {str(problem)[:300]}"
        finally:
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
        assert self.longest_s < LONGEST_S


@pytest.fixture
def tally(record_property) -> Iterator[Tally]:
    found = Tally()
    yield found
    record_property("fault", "generated bad input")
    record_property("tried", found.tried)
    record_property("refused", found.refused)
    record_property("longest_s", round(found.longest_s, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generated")


RECIPE = {**Recipe(model="tiny").model_dump(mode="json"), "engines": ["ort-cpu-fp32"]}
SPEC = load_engine_spec("tensorrt-fp16").model_dump(mode="json", exclude={"name"})
RECIPE_FILES = st.one_of(
    mutated(RECIPE).map(yaml_file),
    garbled(yaml.safe_dump(RECIPE)),
    YAML_SNIPPETS.map(lambda text: text.encode()),
    st.tuples(st.sampled_from(["model: ", "drop: ", "bench: ", "evaluation: "]), YAML_SNIPPETS).map(
        lambda parts: "".join(parts).encode()
    ),
    BYTES,
)
SPEC_FILES = st.one_of(
    mutated(SPEC).map(yaml_file),
    garbled(yaml.safe_dump(SPEC)),
    st.tuples(st.sampled_from(["", "profiles: ", "backend: "]), YAML_SNIPPETS).map(
        lambda parts: "".join(parts).encode()
    ),
    BYTES,
)
KEYS = st.sampled_from(
    [".".join(map(str, path)) for path in _paths(RECIPE)] + ["", ".", "a.b.c", "model.x", "bench..x"]
)
ASSIGNMENTS = st.one_of(
    st.tuples(KEYS, st.one_of(TEXTS, YAML_SNIPPETS, NUMBERS.map(str))).map("=".join), TEXTS, YAML_SNIPPETS
)


def test_recipes(tally, place):
    @given(RECIPE_FILES, st.lists(ASSIGNMENTS, max_size=3))
    def check(content: bytes, sets: list[str]) -> None:
        path = place / "recipe.yaml"
        path.write_bytes(content)

        def read() -> None:
            values, source = load_recipe_values(str(path))
            recipe = read_recipe(override(values, sets), source)
            parse_drop(recipe.drop, 30)
            read_yaml(path, RecipeError)

        tally(read)

    check()


def test_drops_and_settings_of_a_measurement(tally):
    ranges = st.tuples(
        NUMBERS.map(str), st.sampled_from(["..", "%..", ":"]), NUMBERS.map(str), st.sampled_from(["", "%", ":1", ":0"])
    )

    @given(st.one_of(TEXTS, ranges.map("".join), st.from_regex(r"\d{1,3}%?\.\.\d{1,12}%?(:\d{0,3}(\.\d{1,9})?)?%?")))
    def check(text: str) -> None:
        tally(
            lambda: parse_drop(text, 30),
            lambda: parse_drops(text, 30),
            lambda: parse_drops(text),
            lambda: read_bench_settings(override({}, [f"prompt_tokens={text}"]), "--set"),
        )

    check()


def test_engine_specs(tally, place):
    @given(SPEC_FILES)
    def check(content: bytes) -> None:
        path = place / "engine.yaml"
        path.write_bytes(content)
        tally(lambda: load_engine_spec(str(path)), lambda: read_yaml(path, EngineSpecError))

    check()


PLAN = PruningPlan(
    model="tiny", num_layers=6, dropped=(1, 4), kept=(0, 2, 3, 5), method="trsp", seed=0, settings={}, calibration="x"
).model_dump(mode="json")


def test_plans(tally, place):
    @given(st.one_of(mutated(PLAN).map(as_file), garbled(json.dumps(PLAN)), BYTES, st.just(b"[" * 100_000)))
    def check(content: bytes) -> None:
        path = place / "plan.json"
        path.write_bytes(content)
        tally(lambda: read_plan(path, 6))

    check()


def test_baselines(tally, place):
    engines = {"ort-cpu-fp32": engine_baseline(made_up(replicates=3), {})}
    valid = Baseline(
        schema_version=SCHEMA_VERSION, machine=this_machine(), engines=engines, provenance=provenance()
    ).model_dump(mode="json")

    @given(st.one_of(mutated(valid).map(as_file), garbled(json.dumps(valid)), BYTES))
    def check(content: bytes) -> None:
        path = place / "baseline.json"
        path.write_bytes(content)
        tally(lambda: read_baseline(path))

    check()


def unsealed(path: Path) -> dict[str, Any]:
    """A record's values without the seal, which would refuse every other value before anything looks at it."""
    values: dict[str, Any] = json.loads(path.read_text())
    del values["sha256"]
    return values


def served_repository() -> dict[str, Any]:
    """A repository's manifest, as a `triton` writes it."""
    model = ServedModel(
        name="m",
        role="pruned",
        engine="ort-cpu-fp32",
        backend="onnxruntime-cpu",
        backend_version="1",
        precision="fp32",
        packages=("onnxruntime==1",),
        max_batch=1,
        max_length=8,
        files={"1/model.py": "0" * 64},
    )
    return RepositoryManifest(
        models=(model,), packages=model.packages, gpu=None, container="c", provenance=provenance()
    ).model_dump(mode="json")


def test_records_and_manifests(tally, place):
    """What a run folder holds: unreadable is as good as absent, or an engine that is unavailable with its reason."""
    run = made_run(place / "run")
    engine = run / "engines" / "ort-cpu-fp32" / "pruned"
    (place / "repository").mkdir()
    seeds = [unsealed(run / "records" / "prune.json"), unsealed(engine / "manifest.json"), served_repository()]
    sealed = (run / "records" / "prune.json").read_text()

    @given(st.one_of(*(mutated(seed).map(as_file) for seed in seeds), garbled(sealed), BYTES))
    def check(content: bytes) -> None:
        for path in (run / "records" / "prune.json", engine / "manifest.json", place / "repository" / MANIFEST):
            path.write_bytes(content)
        with RunFolder(run) as folder:
            tally(
                lambda: folder.record("prune"),
                lambda: read_manifest(engine),
                lambda: verify(engine),
                lambda: read_repository(place / "repository").texts,
                lambda: verify(place / "repository"),
            )

    check()


def test_reports(tally, place):
    """A run's report and manifest, as a push, `verify` and `clean` read them."""
    run = place / "reported"
    reports = [made_up_report(made_up(replicates=3)).model_dump(mode="json"), made_up_served().model_dump(mode="json")]
    (run / "pruned").mkdir(parents=True)
    (run / "pruned" / "README.md").write_text("# A model\n")
    (run / "plan.json").write_text(json.dumps(PLAN))
    with RunFolder(run) as folder:
        made = PruningPlan.model_validate(reports[0]["plan"])
        folder.step("prune", lambda: made, PruningPlan, settings={}, inputs={}, outputs=["pruned"])
        folder.write_manifest()
    reports.append(unsealed(run / MANIFEST))

    @given(st.one_of(*map(mutated, reports)).map(as_file) | st.one_of(BYTES, garbled(json.dumps(reports[0]))))
    def check(content: bytes) -> None:
        for name in ("report.json", MANIFEST):
            (run / name).write_bytes(content)
        with RunFolder(run) as folder:
            tally(lambda: plan_push(run, "owner/name"), lambda: verify(run), lambda: plan_cleaning((folder,), None))

    check()


# -- command lines -----------------------------------------------------------------------------------------------------

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Watch:
    """Every path that this process writes to while `on`; Python tells each before it is done."""

    def __init__(self) -> None:
        self.on = False
        self.written: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(arguments[0], int):
                self.written.add(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
        elif event in WRITES and not isinstance(arguments[0], int):
            self.written.add(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


OUTS = st.sampled_from(
    ["out", "a/b/out", "text.txt/out", "out\nline", "é" * 300, "", ".", "out/../out", "/proc/nowhere"]
)
PLACES = st.one_of(
    st.sampled_from(
        [
            "nowhere",
            "empty",
            "broken",
            "text.txt",
            "pipe",
            "pipe.yaml",
            "pipe.txt",
            "deep.json",
            "/dev/zero",
            "latin.txt",
            "made-run",
            "made-run/engines/ort-cpu-fp32/pruned",
            "made-sweep",
            "made-repository",
        ]
    ),
    st.sampled_from(["bad.onnx", "broken/recipe.yaml", "x.onnx", "~", "/proc/self/mem"]),
    TEXTS.filter(lambda text: not text.startswith("-")),
)
NAMED_TEXTS = st.one_of(PLACES, st.sampled_from(["wiki-demo", "owner/name:train", "a=b=c", "=", "x=nowhere.txt", "c4"]))
OPTIONS: dict[str, st.SearchStrategy[str]] = {
    "--model": st.one_of(PLACES, st.sampled_from(["opt-6.7b", "owner/name", "opt-6.7"])),
    "--drop": st.one_of(TEXTS, st.sampled_from(["1", "25%", "5%..50%", "2..12:2"])),
    "--recipe": st.one_of(PLACES, st.sampled_from(["default", "opt-6.7b", "broken.yaml"])),
    "--engine": st.one_of(PLACES, st.sampled_from(["auto", "ort-cpu-fp32", "broken.yaml"])),
    "--calibration": NAMED_TEXTS,
    "--eval": NAMED_TEXTS,
    "--seed": st.one_of(TEXTS, NUMBERS.map(str)),
    "--set": ASSIGNMENTS,
    "--plan": PLACES,
    "--method": st.one_of(TEXTS, st.sampled_from(["trsp", "fold"])),
    "--then": TEXTS,
    "--task": TEXTS,
    "--onnx": PLACES,
    "--against": PLACES,
    "--min-speedup": st.one_of(TEXTS, NUMBERS.map(str), st.sampled_from(["1.2", "decode=1.1", "nan"])),
    "--max-latency-regression": TEXTS,
    "--max-ppl-ratio": NUMBERS.map(str),
    "--quality-budget": st.one_of(TEXTS, st.sampled_from(["99%", "100%"])),
    "--min-accuracy-retained": TEXTS,
    "--budget": NUMBERS.map(str),
    "--prompt": TEXTS,
    "--max-tokens": NUMBERS.map(str),
    "--temperature": NUMBERS.map(str),
    "--tokenizer": PLACES,
    "--target-latency": TEXTS,
    "--target-speedup": NUMBERS.map(str),
    "--name": TEXTS,
    "--max-batch": NUMBERS.map(str),
    "--max-length": NUMBERS.map(str),
    "--concurrency": st.one_of(TEXTS, st.sampled_from(["1,8", "0"])),
    "--url": st.one_of(TEXTS, st.sampled_from(["localhost:1:2"])),
    "--key": PLACES,
    "--public-key": PLACES,
    "--keep": st.one_of(TEXTS, st.sampled_from(["dense,engines", "engines/ort-cpu-fp32", "engines/..", ","])),
}
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = ["--json", "--plan-memory", "--ignore-memory", "--dense", "--step", "--private", "--unknown", "-x"]
WITHOUT_A_FOLDER = ["prune-and-build", "prune", "sweep"]
TAKES = {
    **dict.fromkeys(WITHOUT_A_FOLDER, 0),
    **dict.fromkeys(["export", "build", "bench", "evaluate", "report", "baseline", "check", "inspect", "generate"], 1),
    **dict.fromkeys(["triton", "triton-lint", "triton-stop", "bench-server", "compare"], 1),
    **dict.fromkeys(["verify", "sign", "convert", "clean", "push"], 1),
}


def _taken(command: str, options: Iterable[str]) -> list[str]:
    """Those of the options that a command takes; none of what is no command."""
    taken = [name for parameter in COMMANDS[command].params for name in parameter.opts] if command in COMMANDS else []
    return [option for option in options if option in taken]


@st.composite
def command_lines(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[list[str], str | None]:
    """A command with arguments, and the folder that it may write to."""
    command = draw(st.sampled_from([*TAKES, *WITHOUT_A_FOLDER, "compare", "recipes show", "engines show", "nonsense"]))
    arguments = command.split()
    folder = None
    for _ in range(TAKES.get(command, 1)):
        folder = draw(PLACES)
        arguments.append(folder)
    if command == "compare" and draw(st.booleans()):
        arguments.append(draw(PLACES))
    if command == "push":
        arguments.append(draw(OPTIONS["--model"]))
    if command in ("push", "clean"):
        arguments.append("--dry-run")
    if command == "sign" and draw(st.integers(0, 3)):
        arguments += ["--key", draw(PLACES)]
    if command in ("prune-and-build", "prune") and draw(st.integers(0, 3)):
        arguments += ["--model", draw(OPTIONS["--model"])]
    of_its_own = draw(st.integers(0, 3))  # else most command lines end at an option of another command
    known = _taken(command, OPTIONS) if of_its_own else list(OPTIONS)
    for option in draw(st.lists(st.sampled_from(known), max_size=4)) if known else ():
        arguments += [option, draw(OPTIONS[option])]
    flags = _taken(command, FLAGS) if of_its_own else FLAGS
    arguments += draw(st.lists(st.sampled_from(flags), max_size=2, unique=True)) if flags else []
    out = draw(OUTS)
    writes = (*WITHOUT_A_FOLDER, "compare", "triton", "build", "baseline", "check", "convert")
    if command in writes and draw(st.integers(0, 4)):
        arguments += ["--out", out]
        return arguments, out
    if command == "baseline":
        return arguments, "baseline.json"  # where it writes unless it is told
    return arguments, folder


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with something of everything that is broken, and no network."""
    for name in ("empty", "broken", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("pipe", "pipe.yaml", "pipe.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x09garbage")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "broken" / "recipe.yaml").write_text("model: nowhere\n")
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_text("[]")
    (tmp_path / "broken" / "config.pbtxt").write_text("a: [")
    made_run(tmp_path / "made-run")
    made_sweep(tmp_path / "made-sweep")
    (tmp_path / "made-repository").mkdir()
    (tmp_path / "made-repository" / MANIFEST).write_text(json.dumps(served_repository()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRSP_DEPLOY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.delenv("TRSP_DEPLOY_TRITON", raising=False)
    return tmp_path


def test_command_lines(tally, sandbox, watch):
    import trsp_deploy.pipeline  # noqa: F401  what is imported late writes bytecode

    @given(command_lines())
    def check(drawn: tuple[list[str], str | None]) -> None:
        arguments, folder = drawn
        watch.written.clear()
        out, err = io.StringIO(), io.StringIO()
        began = time.perf_counter()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            watch.on = True
            try:
                code = run(arguments)
            finally:
                watch.on = False
        tally.tried += 1
        tally.refused += code == 1
        tally.longest_s = max(tally.longest_s, time.perf_counter() - began)
        said = err.getvalue()
        assert code in (0, 1, 2, 3), said[-3000:]
        assert code == 0 or code != 1 or said.splitlines()[-1].startswith("error: "), said
        assert len(said) < LONGEST_LINE, said[:3000]
        assert tally.longest_s < LONGEST_S
        allowed = [sandbox / "runs", *([] if folder is None else [Path(os.path.abspath(sandbox / folder))])]  # noqa: PTH100
        strange = [path for path in watch.written if not any(_below(path, each) for each in allowed)]
        assert not strange, (arguments, strange)

    check()


def _below(path: str, folder: Path) -> bool:
    """Whether it is in the folder, is the folder, leads to it, or is on its way to be it (`.NAME.partial`, or a trial
    of the nearest folder that is there)."""
    written = Path(path)
    aside = written.parent in folder.parents and written.name.startswith(f".{folder.name}.")
    return aside or folder in (written, *written.parents) or written in folder.parents or "__pycache__" in path
