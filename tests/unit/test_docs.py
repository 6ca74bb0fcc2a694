"""What the docs say is so: every command line parses, every name in it exists, and the reference page is the code's.

Nothing heavy runs: a command line is given to the real parser, and stops before the command.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.exceptions import TyperException

from tests import doc_lines
from tests.doc_lines import GENERATED, NOT_RUN, PAGES, ROOT, ROOT_COMMAND, Line, lines_of, unmarked
from trsp_deploy.cli import reference
from trsp_deploy.cli.judging_options import asked_of
from trsp_deploy.errors import TrspError
from trsp_deploy.recipe import METHODS, EngineSpec, Recipe, Strict, override, read_bench_settings, read_recipe
from trsp_deploy.tools.library import load_engine_spec, load_recipe_values
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.sources.names import SHORT_NAMES
from trsp_deploy.tools.sources.packaged import ASSETS

# Comments and error messages name commands too.
SOURCES = [
    *sorted(path for folder in ("recipes", "engines") for path in (ROOT / folder).glob("*.yaml")),
    *sorted((ROOT / "trsp_deploy").rglob("*.py")),
    *(ROOT / name for name in ("Makefile", "action.yml", "Dockerfile")),
]
CURRENT = [page for page in PAGES if page.name not in ("CHANGELOG.md", "log.md")]  # these name what is gone
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|\$.*|\{.*\}|…|\.\.\.")
NUMBER_TYPES = (int, float)


def test_every_environment_variable_that_is_read_stands_in_the_glossary() -> None:
    """Each that the code reads or sets by its name; PATH needs no words."""
    named = set()
    for path in sorted((ROOT / "trsp_deploy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=where, attr="get" | "setdefault" | "pop"), args=[name, *_]):
                    named |= _variables(where, name)
                case ast.Subscript(value=where, slice=name):
                    named |= _variables(where, name)
                case ast.Compare(left=name, comparators=[where]):
                    named |= _variables(where, name)
    assert {"OMP_WAIT_POLICY", "GITHUB_ACTIONS", "TRSP_DEPLOY_HOME", "RANK"} <= named
    table = (ROOT / "docs" / "glossary.md").read_text().partition("## Environment variables")[2]
    assert [name for name in sorted(named - {"PATH"}) if f"`{name}`" not in table] == []


def _variables(where: ast.expr, name: ast.expr) -> set[str]:
    """The variable of an access to `os.environ`; none of anything else."""
    is_environment = isinstance(where, ast.Attribute) and where.attr == "environ"
    return {name.value} if is_environment and isinstance(name, ast.Constant) else set()


def test_pages_are_there() -> None:
    assert all(page.is_file() for page in PAGES)


def parse(text: str, whole: bool = True) -> str | None:
    """What is wrong with a command line, or None."""
    try:
        words = [word for word in shlex.split(text) if word not in ("-h", "--help")]
    except ValueError as problem:
        return str(problem)
    command, name = ROOT_COMMAND, ""
    while hasattr(command, "commands"):
        known = {option for parameter in command.params for option in parameter.opts}
        while words and words[0].startswith("-"):
            if words.pop(0) not in known:
                return f"no such option of {name or 'trsp-deploy'}"
        if not words:
            return None
        name = words.pop(0)
        if PLACEHOLDER.fullmatch(name):
            return None  # `trsp-deploy COMMAND --help`
        if name not in command.commands:
            return f"no such command '{name}'"
        command = command.commands[name]
    try:
        context = command.make_context(name, list(_numbers(command, words)), resilient_parsing=False)
    except TyperException as problem:
        missing = type(problem).__name__ in ("MissingParameter", "BadOptionUsage")
        return None if missing and not whole else problem.format_message()
    return _unknown_name(name, context.params)


def _numbers(command: Any, words: list[str]) -> Iterator[str]:
    """The words with 2 in the place of N where a number is expected."""
    numeric = {
        option
        for parameter in command.params
        if parameter.type_descriptor.annotation in NUMBER_TYPES
        for option in parameter.opts
    }
    before = ""
    for word in words:
        yield "2" if before in numeric and PLACEHOLDER.fullmatch(word) else word
        before = word


def _unknown_name(command: str, values: dict[str, Any]) -> str | None:
    """A recipe, engine, method, asset or key that does not exist."""
    engines = values.get("engine") or ()
    engines = [engines] if isinstance(engines, str) else [] if isinstance(engines, Path) else engines  # of `inspect`
    named: list[tuple[Any, Any]] = [(load_engine_spec, name) for name in engines]
    named += [(load_recipe_values, values.get("recipe")), (_check_model, values.get("model"))]
    named += [(METHODS.__getitem__, values.get("method"))]
    named += [(ASSETS.__getitem__, name) for name in (values.get("names") or () if command == "fetch" else ())]
    sets = [text for text in values.get("sets") or () if not PLACEHOLDER.fullmatch(text.partition("=")[0])]
    for check, name in named:
        if name is None or PLACEHOLDER.fullmatch(name) or name.endswith(".yaml"):
            continue
        try:
            check(name)
        except (KeyError, TrspError) as problem:
            return f"{name}: {problem}"
    try:
        if command == "compare":
            asked_of(None, None, None, None, None, list(sets))
        elif command in ("baseline", "check"):
            read_bench_settings(override({}, list(sets)), "--set")
        else:
            read_recipe(override({"model": "m"}, list(sets)), "--set")
    except TrspError as problem:
        return str(problem)
    return None


def _check_model(name: str) -> None:
    if "/" not in name and name not in SHORT_NAMES:
        raise KeyError(name)


FOUND = [line for path in (*PAGES, *SOURCES) if path != GENERATED for line in lines_of(path)]


def test_there_are_commands_to_check() -> None:
    from_pages = [line for line in FOUND if line.place.endswith(".md") and line.whole]
    assert len(from_pages) > 30
    assert {line.place for line in from_pages} >= {"README.md", "docs/triton.md", "docs/many-gpus.md", "docs/ci.md"}


@pytest.mark.parametrize("line", FOUND, ids=lambda line: f"{line.place}: {line.text}"[:90])
def test_a_command_of_the_docs_parses(line: Line) -> None:
    for text in _alternatives(line.text):
        assert parse(text, line.whole) is None, f"{line.place}: trsp-deploy {text}"


def _alternatives(text: str) -> list[str]:
    """`recipes ls|show` is two commands."""
    found = re.search(r"(\w+)\|(\w+)", text)
    return [text] if found is None else [text.replace(found[0], each) for each in found.groups()]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prune-and-build --model opt-6.7b --dorp 25%", "--dorp"),
        ("prune-and-bild --model opt-6.7b", "no such command"),
        ("check RUN --min-speedup", "requires an argument"),
        ("check --min-speedup 1.2", "Missing argument"),
        ("report RUN OTHER", "unexpected extra argument"),
        ("recipes list", "no such command"),
        ("bench-server REPO --window soon", "--window"),
        ("prune --model opt-6.7", "opt-6.7"),
        ("prune --model MODEL --set transfer.step=3", "did you mean 'steps'"),
        ("check RUN --set steps=3", "unknown key 'steps'"),
        ("build RUN --engine ort-cpu-fp23", "did you mean 'ort-cpu-fp32'"),
        ("prune --recipe defalt", "did you mean 'default'"),
        ("prune --model MODEL --method slep", "slep"),
        ("fetch smollm2", "smollm2"),
    ],
)
def test_a_wrong_command_is_found(text: str, complaint: str) -> None:
    assert complaint in (parse(text) or "")


def test_where_commands_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_lines, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Say `doctor --json`, `triton-lint`\nand `trsp-deploy\ncheck RUN`.\n\n"
        "    trsp-deploy prune --a 1 \\\n        --b 2  # why\n"
        "\n```sh\naccelerate launch --x 8 \\\n    -m trsp_deploy prune --c\n# a comment: trsp-deploy nothing\n```\n"
    )
    assert [(line.text, line.whole) for line in lines_of(page)] == [
        ("prune --a 1 --b 2", True),
        ("prune --c", True),
        ("doctor --json", False),
        ("check RUN", False),
    ]


def test_lines_of_other_programs_are_marked(tmp_path: Path) -> None:
    """What `make test-docs` does not run says so."""
    assert {page.name: lines for page in PAGES if page != GENERATED and (lines := unmarked(page))} == {}
    page = tmp_path / "page.md"
    page.write_text(f"Text\n\n    make x  # -o\n    load --at 1 \\\n        --for 2\n    {NOT_RUN}\n    load --at 3\n")
    assert unmarked(page) == ["load --at 1  --for 2"]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("cli.md", reference.command_page),
        ("recipe-keys.md", reference.keys_page),
        ("recipes.md", reference.catalogue_page),
    ],
)
def test_reference_pages_are_what_the_code_says(name: str, page: Callable[[], str]) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == page(), "run `python -m trsp_deploy.cli.reference docs`"


def test_baseline_says_that_it_measures_every_engine() -> None:
    """It had the words of the commands that judge one."""
    page = reference.command_page().partition("\n## baseline\n")[2].partition("\n## ")[0]
    assert (
        "One of the run's engines; else every one that runs here." in page and "Seconds to measure each engine;" in page
    )


def test_the_reference_has_every_command_and_option() -> None:
    text = reference.command_page()
    for name, command in reference.commands():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert command.help in section
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}" in section


def test_the_tutorials_check_passes_with_the_tutorials_figures() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    ((least, most),) = re.findall(r"trsp-deploy check .* --min-speedup ([\d.]+) --max-ppl-ratio ([\d.]+)\n", text)
    end_to_end = re.findall(r"^ +end to end .*x \(([\d.]+) to [\d.]+\)", text, re.MULTILINE)
    perplexity = re.findall(r"^ +ppl on .*x \([\d.]+ to ([\d.]+)\)", text, re.MULTILINE)
    assert [float(low) >= float(least) for low in end_to_end] == [True]
    assert [float(high) <= float(most) for high in perplexity] == [True, True]


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:`|^    )make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


MODULES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("trsp_deploy", "tests", "benchmarks", "release", "docs")
    for path in (ROOT / folder).rglob("*.py")
}


def modules(name: str) -> list[Path]:
    """The files that a page may mean by a path, or by the end of one."""
    return [path for whole, path in MODULES.items() if whole == name or whole.endswith(f"/{name}")]


def test_modules_in_the_docs_exist() -> None:
    for page in CURRENT:
        for name in re.findall(r"\b([\w/]+\.py)\b", page.read_text(encoding="utf-8")):
            elsewhere = name == "model.py" or "NAME" in name  # of a model repository; to be written
            assert elsewhere or modules(name), f"{page.relative_to(ROOT)}: {name}"


def test_what_the_docs_find_in_a_module_is_there() -> None:
    """`NAME` in `module.py`, and the names of tests."""
    tests = "\n".join(path.read_text(encoding="utf-8") for name, path in MODULES.items() if name.startswith("tests/"))
    found = 0
    for page in CURRENT:
        text = page.read_text(encoding="utf-8")
        for symbol, module in re.findall(r"`(\w+)`\s+(?:in\s+|of\s+|\()[`\[]([\w/]+\.py)[`\]]", text):
            defined = re.compile(rf"^(?:class |def )?{symbol}\b", re.MULTILINE)
            sources = (path.read_text(encoding="utf-8") for path in modules(module))
            assert any(map(defined.search, sources)), f"{page.relative_to(ROOT)}: {symbol} in {module}"
            found += 1
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{page.relative_to(ROOT)}: {name}"
    assert found > 10


def test_recipe_keys_in_the_docs_exist() -> None:
    """`transfer.kl_weight` and the like, anywhere in inline code."""
    groups = {name: field.annotation for name, field in Recipe.model_fields.items()}
    records = {name: kind for name, kind in groups.items() if hasattr(kind, "model_fields")}
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):  # which names what is gone
        for group, key in re.findall(r"`(?:--set )?([a-z]+)\.([a-z_]+)(?:[`=: ])", page.read_text(encoding="utf-8")):
            if group in records and key not in ("json", "md", "html", "yaml", "py"):
                assert key in records[group].model_fields, f"{page.name}: {group}.{key}"


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` stops at one that is not; this says so without MkDocs."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/.-]+\.md", str(config["nav"]))
    generated = {"architecture.md", "changelog.md", "contributing.md", "security.md"}  # docs/site_hooks.py
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages | generated)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            # Pages that MkDocs makes out of the root's have no file under docs/.
            found = (page.parent / target).exists() or (ROOT / f"{Path(target).stem.upper()}.md").is_file()
            assert "://" in target or found, f"{page.relative_to(ROOT)}: {target}"


def test_keys_of_an_engine_spec_are_all_explained() -> None:
    text = (ROOT / "docs" / "own-engine.md").read_text(encoding="utf-8")
    table = text.partition("<!-- keys:start -->")[2].partition("<!-- keys:end -->")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {*EngineSpec.model_fields}


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside it: records, and the values of a Literal."""
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def records_of_a_report() -> dict[type[Strict], str]:
    """Every record of `report.json` and the path where it is nearest to the top, but for the recipe, whose keys have a
    page of their own."""
    found: dict[type[Strict], str] = {Report: ""}
    for record in (queue := [Report]):  # grows meanwhile
        for name, field in record.model_fields.items():
            for kind in parts(field.annotation):
                if isinstance(kind, type) and issubclass(kind, Strict) and kind not in {*found, Recipe}:
                    found[kind] = f"{found[record]}.{name}".removeprefix(".")
                    queue.append(kind)
    return found


PRINTED = "## What `--json` prints"


def test_the_keys_of_a_report_are_those_of_its_page() -> None:
    page = (ROOT / "docs" / "report-schema.md").read_text(encoding="utf-8").partition(PRINTED)[0]
    rows = {path.replace("[]", ""): text for path, text in re.findall(r"^\| `([\w.\[\]]+)` \| (.*) \|$", page, re.M)}
    rows[""] = " ".join(f"`{path}`" for path in rows if "." not in path)
    records = records_of_a_report()
    for record, path in records.items():
        row = max((row for row in rows if f"{path}.".startswith(f"{row}." if row else "")), key=len)
        missing = [name for name in record.model_fields if f"`{name}`" not in rows[row]]
        assert not missing, f"`{row}` says nothing of {path}: {missing}"
    fields = [field for record in records for field in record.model_fields.items()]
    known = {name for name, _ in fields} | {kind for _, field in fields for kind in parts(field.annotation)}
    said = {word for text in rows.values() for word in re.findall(r"`([a-z_]+)`", text)}
    assert said <= known, "the page names what no report has"


def test_the_json_of_every_command_is_on_the_page() -> None:
    table = (ROOT / "docs" / "report-schema.md").read_text(encoding="utf-8").partition(PRINTED)[2]
    first = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    named = {name.removesuffix(" RUN").removesuffix(" --onnx") for name in re.findall("`([^`]+)`", first)}
    printing = {
        name
        for name, command in reference.commands()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert named == printing


def test_the_example_of_a_module_calls_what_is_there() -> None:
    found = 0
    for path in (path for name, path in MODULES.items() if name.startswith("trsp_deploy/")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
        for line in (ast.get_docstring(tree) or "").splitlines():
            for name, given in calls_of(line) if line.startswith("    ") else ():
                if name not in functions:
                    continue
                names = [each.arg for each in functions[name].args]
                wanted = {*names[: len(names) - len(functions[name].defaults)]}
                by_place = [names[place] for place, key in enumerate(given) if key is None and place < len(names)]
                said = {*by_place, *(key for key in given if key)}
                assert wanted <= said and len(said) == len(given), f"{path.relative_to(ROOT)}: {line.strip()}"
                found += 1
    assert found > 10


def calls_of(line: str) -> Iterator[tuple[str, list[str | None]]]:
    """Every call of a name in a line of Python: the name, and for each argument its keyword or None."""
    try:
        tree = ast.parse(line.strip())
    except SyntaxError:
        return  # a drawing, or half a statement
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, [*(None for _ in node.args), *(keyword.arg for keyword in node.keywords)]


# -- error messages ----------------------------------------------------------------------------------------------------

HOLE = "\0"  # what is of a run, in a message


def messages() -> list[str]:
    """Every string of the code, with a HOLE for each value in it."""
    found = []
    for path in sorted((ROOT / "trsp_deploy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(page: str) -> list[str]:
    """The messages in the first column of the page's tables; one with several pieces of code gives several."""
    cells = re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell) if len(message) > 9]


def occurs(message: str, within: str) -> bool:
    return re.search(f"[^{HOLE}]*{HOLE}[^{HOLE}]*".join(map(re.escape, message.split("…"))), within) is not None


QUOTED = quoted((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def said() -> list[str]:
    return messages()


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 50


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message: str, said: list[str]) -> None:
    assert any(occurs(message, text) for text in said)


def test_a_message_that_is_gone_is_found(said: list[str]) -> None:
    assert not any(occurs("--drop '…' is … of the model's heads", text) for text in said)
    assert any(occurs("--drop '…' is … of the model's … layers", text) for text in said)
    assert quoted("| it says | why |\n|---|---|\n| `ab cd ef gh` or `x` | y | z |\n") == ["ab cd ef gh"]
