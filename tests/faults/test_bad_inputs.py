"""Generated bad input: recipes, engine specs, plans, baselines and other records.

A few of each by default; `make faults` draws 10,000 (`HYPOTHESIS_PROFILE=faults`). Whatever comes: one of the errors in
trsp_deploy/errors.py with a short message or a valid value, soon.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'trsp_deploy[dev]'")

from hypothesis import given
from hypothesis import strategies as st

from tests.breadth import BREADTH
from tests.faults.drawn import (
    ASSIGNMENTS,
    BYTES,
    NUMBERS,
    RECIPE,
    TEXTS,
    YAML_SNIPPETS,
    as_file,
    garbled,
    mutated,
    yaml_file,
)
from tests.made_run import made_run, served_repository
from tests.samples import made_up, made_up_report, made_up_served
from trsp_deploy.artifacts import MANIFEST, RunFolder, provenance
from trsp_deploy.errors import EngineSpecError, RecipeError
from trsp_deploy.reading import read_yaml
from trsp_deploy.recipe import override, parse_drop, parse_drops, read_bench_settings, read_recipe
from trsp_deploy.tools.delivery.publishing import plan_push
from trsp_deploy.tools.delivery.verification import verify
from trsp_deploy.tools.library import load_engine_spec, load_recipe_values
from trsp_deploy.tools.model_repository.manifest import read_repository
from trsp_deploy.tools.plan import PruningPlan, read_plan
from trsp_deploy.tools.reports.baselines import SCHEMA_VERSION, Baseline, engine_baseline, read_baseline, this_machine
from trsp_deploy.tools.resources.cleaning import plan_cleaning
from trsp_deploy.tools.runners.manifest import read_manifest

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


@BREADTH
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
