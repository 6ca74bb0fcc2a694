"""The whole job on a tiny model, as a user runs it: a process of its own, and the files it leaves."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.breadth import BREADTH
from tests.command import QUICK, Done, own_process, trsp_deploy
from tests.planted import SECRETS, check_no_secret
from tests.tiny import english, save_tiny
from trsp_deploy.artifacts import RunFolder, size_bytes
from trsp_deploy.checks import Tolerances, check_run
from trsp_deploy.errors import EngineUnavailable, RecipeError
from trsp_deploy.pipeline import Pipeline
from trsp_deploy.pipeline.runs import load_recipe
from trsp_deploy.recipe import BenchSettings, read_recipe
from trsp_deploy.tools.library import load_engine_spec
from trsp_deploy.tools.reports.record import Report
from trsp_deploy.tools.resources import disk, memory_plan
from trsp_deploy.tools.resources.disk import plan_disk
from trsp_deploy.tools.runners import open_engine
from trsp_deploy.tools.sources.overlap import overlap_note

BUILDS, RUNS = ["onnx fp32", "engine ort-cpu-fp32"], ["run ort-cpu-fp32", "evaluation"]  # stages of one engine
ENGINES = ["ort-cpu-fp32", "tensorrt-rtx-fp16", "ort-cuda-fp16", "tensorrt-fp16"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny("llama", folder / "tiny-llama", hidden_size=64, intermediate_size=128)
    (folder / "train.txt").write_text(english()[:60_000])
    (folder / "test.txt").write_text(english()[60_000:90_000])
    rows = [json.dumps({"text": english()[start : start + 2000]}) for start in range(90_000, 110_000, 2000)]
    (folder / "other.jsonl").write_text("\n".join(rows))
    return folder


def job(
    workspace: Path,
    *more: str,
    model: Path | str = "tiny-llama",
    drop: str = "34%",
    out: Path | str = "run",
    call: Callable[..., Done] = trsp_deploy,
) -> Done:
    options = [option for pair in QUICK for option in ("--set", pair)]
    engines = [option for name in ENGINES for option in ("--engine", name)]
    texts = ["--calibration", "train.txt", "--eval", "manual=test.txt", "--eval", "other=other.jsonl"]
    command = ["prune-and-build", "--model", str(model), "--drop", drop, *texts, *engines, *options]
    return call(*command, "--out", str(out), *more, cwd=workspace)


@pytest.fixture(scope="module")
def first(workspace) -> Done:
    done = job(workspace, "--json", call=functools.partial(own_process, **SECRETS))
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def report(workspace, first) -> dict:
    return json.loads((workspace / "run" / "report.json").read_text())


def steps(stderr: str, state: str) -> set[str]:
    lines = [line.removeprefix("> ").split(": ") for line in stderr.splitlines() if line.startswith("> ")]
    return {line[0] for line in lines if len(line) == 2 and line[1].startswith(state)}


def test_stdout_is_one_json_line(first, report):
    lines = first.stdout.splitlines()
    assert len(lines) == 1
    summary = json.loads(lines[0])
    for part in ("schema_version", "verdict", "model", "quality", "engines"):
        assert summary[part] == report[part]


def test_the_last_line_says_where_the_page_is(workspace, first):
    last = first.stderr.splitlines()[-1]  # with --json what people read is there
    assert last == "report: run/report.html, and the same as report.md and report.json"
    assert (workspace / "run" / "report.html").is_file()


def test_model_part_of_the_report(report):
    model = report["model"]
    assert report["schema_version"] == 2
    assert (model["name"], model["architecture"]) == ("tiny-llama", "LlamaForCausalLM")
    assert (model["num_layers_dense"], model["num_layers_pruned"]) == (6, 4)
    assert len(model["dropped_layers"]) == 2
    assert model["layers_dropped_share"] == pytest.approx(2 / 6)
    share = 1 - model["parameters_pruned"] / model["parameters_dense"]
    assert model["parameters_dropped_share"] == pytest.approx(share)
    assert 0 < share < model["layers_dropped_share"]


def test_no_place_of_this_machine_is_in_the_report(workspace, report):
    assert report["plan"]["calibration"] == "train.txt" and report["recipe"]["calibration"]["texts"] == "train.txt"
    assert str(workspace) not in json.dumps(report)


def test_quality_is_paired_and_finite(report):
    assert set(report["quality"]) == {"manual", "other"}
    for text in report["quality"].values():
        assert text["ratio"] == pytest.approx(text["pruned_ppl"] / text["dense_ppl"])
        assert text["ratio_low"] <= text["ratio"] <= text["ratio_high"]
        assert text["tokens"] == 630
    assert report["removal"]["before_ppl"] == report["removal"]["after_ppl"]


def test_every_engine_is_accounted_for(report):
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert list(engines) == ENGINES
    ran = engines["ort-cpu-fp32"]
    assert ran["status"] == "ran" and ran["reason"] is None
    found = ran["comparison"]
    phases = {phase["phase"]: phase for phase in found["phases"]}
    assert set(phases) == {"prefill", "decode", "total"}
    for phase in phases.values():
        assert 1 < phase["limit"] < 1.5 and 0 < phase["pruned_s"] < 1
        assert phase["speedup"]["low"] <= phase["speedup"]["ratio"] <= phase["speedup"]["high"]
        assert phase["control"]["low"] <= phase["control"]["ratio"] <= phase["control"]["high"]
    assert found["replicates"] >= 2 and found["claim"] in ("CONFIRMED", "NOT THERE", "INCONCLUSIVE")
    for role in ("dense", "pruned"):
        assert ran[role]["size_bytes"] > 0 and found["load_s"][role] > 0
        # The engine's own process, not this test's: an ONNX Runtime session of a tiny model needs under 0.4 GB.
        assert 20e6 < found["peak_rss_bytes"][role] < 400e6
    for name in ENGINES[1:]:
        assert engines[name]["status"] in ("built", "unavailable")
        assert engines[name]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the engine runs")
def test_rtx_is_built_and_not_run_without_a_gpu(workspace, report):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'trsp_deploy[rtx]'")
    engine = {engine["name"]: engine for engine in report["engines"]}["tensorrt-rtx-fp16"]
    assert engine["status"] == "built" and "no CUDA device" in engine["reason"]
    for role in ("dense", "pruned"):
        folder = workspace / "run" / "engines" / "tensorrt-rtx-fp16" / role
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (folder / manifest["file"]).stat().st_size > 100_000


def test_parity_covers_onnx_and_engine_for_both_models(report):
    checked = {(p["subject"], p["role"], p["precision"]) for p in report["parity"]}
    assert {("onnx", role, "fp32") for role in ("dense", "pruned")} <= checked
    assert {("ort-cpu-fp32", role, "fp32") for role in ("dense", "pruned")} <= checked
    assert all(p["passed"] and p["max_error"] <= p["tolerance"] for p in report["parity"])
    floats = [p for p in report["parity"] if p["precision"] in ("fp32", "fp16")]
    assert len(floats) >= 4 and all(abs(p["ppl_ratio"] - 1) <= p["ppl_tolerance"] <= 0.02 for p in floats)
    found = {(p["subject"], p["role"], p["text"]): p["ratio"] for p in report["engines"][0]["to_pytorch"]}
    assert found.keys() == {("ort-cpu-fp32", r, t) for r in ("dense", "pruned") for t in ("manual", "other")}
    assert all(ratio == pytest.approx(1, abs=1e-3) for ratio in found.values())


def test_layout_of_the_run(workspace, report):
    run = workspace / "run"
    for path in ("plan.json", "dense/config.json", "pruned/config.json", "onnx/dense-fp32/model.onnx"):
        assert (run / path).is_file(), path
    for path in ("onnx/pruned-fp32/model.onnx", "report.json", "report.md", "recipe.yaml"):
        assert (run / path).is_file(), path
    for role in ("dense", "pruned"):
        assert (run / "engines" / "ort-cpu-fp32" / role / "manifest.json").is_file()
    plan = json.loads((run / "plan.json").read_text())
    assert sorted(plan["dropped"] + plan["kept"]) == list(range(6))
    assert plan["seed"] == 0 and plan["picks"][0]["gates"] and plan["settings"]["gate"] == "branch"
    assert not list(run.rglob(".*.partial"))


def test_no_secret_gets_into_the_run_or_the_log(workspace, first):
    assert check_no_secret(workspace / "run", first.stdout, first.stderr) > 42


def test_every_file_is_in_the_manifest_as_it_was_made(workspace, report):
    done = trsp_deploy("verify", "run", "--json", cwd=workspace)
    found = json.loads(done.stdout)
    assert (done.code, found["against"], found["findings"]) == (0, "MANIFEST.json", [])
    for role in ("dense", "pruned"):
        assert trsp_deploy("verify", f"run/engines/ort-cpu-fp32/{role}", cwd=workspace).code == 0


def test_the_disk_estimate_was_right(workspace, first):
    said = next(line for line in first.stderr.splitlines() if "of disk (" in line)
    assert "pruned 0.00 GB" in said and "engine ort-cpu-fp32 0.00 GB" in said and "are free" in said
    assert any(line.startswith("> needs main memory: selection ") for line in first.stderr.splitlines())
    run, specs = workspace / "run", [load_engine_spec("ort-cpu-fp32")]
    config, recipe = AutoConfig.from_pretrained(run / "dense"), read_recipe(load_recipe(run), "the run")
    config._name_or_path = "elsewhere"  # a copy and no links
    kept = {stage.stage: stage.kept_bytes for stage in plan_disk(run, recipe, config, specs).stages}
    found = {
        "dense": size_bytes(run / "dense"),
        "pruned": size_bytes(run / "pruned"),
        "onnx fp32": size_bytes(run / "onnx" / "dense-fp32") + size_bytes(run / "onnx" / "pruned-fp32"),
        "engine ort-cpu-fp32": size_bytes(run / "engines" / "ort-cpu-fp32"),
    }
    for stage, size in found.items():
        assert kept[stage] == pytest.approx(size, rel=0.2), stage


@BREADTH
def test_too_small_a_disk_stops_the_job_before_it_begins(workspace, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    done = job(workspace, out=tmp_path / "new")
    assert done.code == 1 and "--ignore-disk runs anyway" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new" / "dense").exists()


@BREADTH
@pytest.mark.parametrize("plan", [False, True])
def test_a_refused_run_of_another_model_leaves_the_finished_one(plan, workspace, report, monkeypatch, tmp_path):
    """What was asked of the records took the other model as `dense/`, and the manifest went with it."""
    run = Path(shutil.copytree(workspace / "run", tmp_path / "run"))
    save_tiny("llama", tmp_path / "other", hidden_size=64, intermediate_size=128, seed=7)
    assert trsp_deploy("build", str(run), "--engine", "ort-cpu-int8", cwd=workspace).code == 0  # of a text
    assert trsp_deploy("report", str(run), cwd=workspace).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "MANIFEST.json" in before
    shutil.copy(run / "plan.json", tmp_path / "mine.json")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    given = ["--plan", str(tmp_path / "mine.json")] if plan else []
    done = job(workspace, "--engine", "ort-cpu-int8", *given, model=tmp_path / "other", out=run)
    assert done.code == 1 and "--ignore-disk runs anyway" in done.last and "dense: started" not in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_markdown_has_the_same_numbers(workspace, report):
    text = (workspace / "run" / "report.md").read_text()
    assert report["verdict"] in text
    assert f"{report['quality']['manual']['ratio']:.2f}x" in text
    assert "tensorrt-fp16: unavailable" in text


def test_the_page_has_raw_losses_to_download(workspace, report):
    assert 'download="quality.json.gz"' in (workspace / "run" / "report.html").read_text()
    assert {each["step"] for each in report["measured"]} >= {"bench-ort-cpu-fp32", "evaluate-manual-dense"}
    comparison = report["engines"][0]["comparison"]
    assert comparison["cores"] >= 1 and comparison["threads"] == dict.fromkeys(("dense", "pruned"), comparison["cores"])


def test_provenance_is_complete(report):
    made = report["provenance"]
    assert {"torch", "transformers", "onnx"} <= set(made["packages"])
    assert made["cores"] >= 1 and made["memory_bytes"] > 1e9
    assert report["recipe"]["seed"] == 0


def test_pruned_folder_works_with_plain_transformers(workspace, report):
    folder = workspace / "run" / "pruned"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 4
    ids = tokenizer("The import statement", return_tensors="pt", add_special_tokens=False).input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "whoever may read one may read the other"


def test_built_engine_runs_from_its_folder(workspace, report):
    with open_engine(workspace / "run" / "engines" / "ort-cpu-fp32" / "pruned") as runner:
        ids = torch.tensor([[5, 6, 7]]).numpy()
        assert runner.prefill(ids, (ids > 0).astype("int64")).shape == (1, 3, 384)


def test_second_run_redoes_nothing(workspace, report):
    again = job(workspace, "--json")
    assert again.code == 0, again.stderr
    assert steps(again.stderr, "started") == set()
    assert len(steps(again.stderr, "reused")) >= 14


@BREADTH
def test_a_finished_run_is_asked_about_what_its_settings_change(workspace, report, tmp_path, monkeypatch):
    shutil.copytree(workspace / "run", tmp_path / "run")
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 800_000_000)  # for a tiny model's training
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)

    def asked(*options: str, drop: str = "34%") -> tuple[Done, set[str]]:
        """What came of it, and the stages that the disk is asked for."""
        done = job(workspace, *options, out=tmp_path / "run", drop=drop)
        said = next((line for line in done.stderr.splitlines() if "of disk (" in line), "()")
        stages = said.partition("(")[2].partition(")")[0].split(", ")
        return done, {stage.removesuffix(" 0.00 GB") for stage in stages if not stage.endswith(" there")}

    same, stages = asked()
    assert same.code == 0 and not stages, same.stderr
    later, _ = asked("--set", "evaluate.context_length=48")
    assert later.code == 1
    refused = later.stderr.splitlines()[-1]
    assert refused.startswith("error: run ort-cpu-fp32 needs about ") and ", evaluation needs about " in refused
    other, stages = asked("--ignore-memory", drop="50%")
    assert other.code == 1 and "--ignore-disk runs anyway" in other.stderr.splitlines()[-1]
    assert any(line.startswith("> needs main memory: selection ") for line in other.stderr.splitlines())
    assert {"pruned", "onnx fp32", "engine ort-cpu-fp32"} <= stages and "dense" not in stages


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, []),
        ({"bench": {"new_tokens": 9}}, RUNS[:1]),
        ({"evaluate": {"context_length": 48}}, RUNS),
        ({"engines": ["ort-cpu-int8"]}, ["engine ort-cpu-int8", "run ort-cpu-int8"]),
        ({"export": {"slim": False}}, [*BUILDS, *RUNS[:1]]),
        ({"transfer": {"form": "l2"}}, ["transfer", *BUILDS, *RUNS]),
        ({"drop": "50%"}, ["selection", "transfer", *BUILDS, *RUNS]),
    ],
)
def test_what_other_settings_leave_to_do(workspace, report, changes, stages):
    """Of the stages with an engine that is built and run here."""
    run = workspace / "run"
    recipe = read_recipe({**load_recipe(run), "engines": ["ort-cpu-fp32"], **changes}, "test")
    assert Pipeline(RunFolder(run), recipe, place=workspace).unfinished() == stages


def test_an_engines_perplexity_is_of_the_tokenizer_too(workspace, report):
    """An export need not hold it, and then the same engine would go on with what other tokens gave."""
    run = RunFolder(workspace / "run")
    (dense,) = run.record("dense").outputs.values()
    for role in ("dense", "pruned"):
        assert run.record(f"evaluate-ort-cpu-fp32-manual-{role}").inputs["tokenizer"] == dense


@BREADTH
def test_a_model_judged_on_calibration_text_says_so(workspace, report, tmp_path):
    """Also where the two share a part: one more paragraph beside the calibration text passed for held-out text."""
    run = shutil.copytree(workspace / "run", tmp_path / "run")
    mixed = f"{(workspace / 'train.txt').read_text()}\n\n{(workspace / 'test.txt').read_text()}"
    (tmp_path / "mixed.txt").write_text(mixed)
    texts = {"same": "train.txt", "mixed": str(tmp_path / "mixed.txt"), "manual": "test.txt"}
    said, recipe = [], read_recipe({**load_recipe(run), "evaluation": texts}, "test")
    with RunFolder(run) as folder:
        job = Pipeline(folder, recipe, say=said.append, place=workspace)
        job.inputs.texts.read_evaluation()
        notes = [overlap_note(name, job.inputs.texts.overlap(name)) for name in texts]
        assert "evaluation 'same': 100.0% of it stands in the calibration text" in notes[0]
        assert job.inputs.texts.overlap("manual") < 0.01 < job.inputs.texts.overlap("mixed") < 1
        assert [line for line in said if "calibration text" in line] == notes[:2]
        settings = BenchSettings(prompt_tokens=(8,), new_tokens=2, budget_s=1.0)
        checked = check_run(job, Tolerances(max_ppl_ratio=100.0), None, "ort-cpu-fp32", settings)
    assert set(notes[:2]) <= set(checked.notes)
    assert not [note for note in checked.notes if "'manual'" in note]


def test_a_report_says_which_texts_were_read(workspace, report):
    calibration, evaluation, _ = Report.model_validate(report).texts
    assert (calibration.role, calibration.name, calibration.overlap) == ("calibration", "train.txt", None)
    assert (evaluation.role, evaluation.name) == ("evaluation", "manual")
    assert evaluation.overlap is not None and 0 <= evaluation.overlap < 0.01
    for text, file in ((calibration, "train.txt"), (evaluation, "test.txt")):
        documents = [part.strip("\n") for part in (workspace / file).read_text().split("\n\n") if part.strip()]
        assert text.sha256 == hashlib.sha256(json.dumps(documents).encode()).hexdigest()
        assert text.documents == len(documents) and text.origin == file and text.bos is False
    windows = evaluation.tokens // report["quality"]["manual"]["context_length"]
    assert evaluation.tokens == report["quality"]["manual"]["tokens"] + windows


def test_an_engine_that_another_took_the_place_of_is_not_opened(workspace, report, tmp_path):
    """Measured and served as the pruned model it would be the dense one."""
    run = Path(shutil.copytree(workspace / "run", tmp_path / "run"))
    engine = run / "engines" / "ort-cpu-fp32" / "pruned"
    with open_engine(engine):
        shutil.rmtree(engine)
    shutil.copytree(engine.with_name("dense"), engine)
    with pytest.raises(EngineUnavailable, match=f"{engine} is not what {run} built; build it again"):
        open_engine(engine)


def test_texts_whose_steps_would_have_one_name_are_refused(workspace, report):
    run = workspace / "run"
    texts = {"manual": "test.txt", "ort-cpu-fp32-manual": "test.txt"}
    recipe = read_recipe({**load_recipe(run), "engines": ["ort-cpu-fp32"], "evaluation": texts}, "test")
    with pytest.raises(
        RecipeError, match="evaluation 'ort-cpu-fp32-manual': is what engine ort-cpu-fp32 on text 'manual'"
    ):
        Pipeline(RunFolder(run), recipe, place=workspace)


def test_a_plan_that_was_edited_or_handed_in_leaves_the_transfer_to_do(workspace, report, tmp_path):
    shutil.copytree(workspace / "run", tmp_path / "run")
    run, recipe = RunFolder(tmp_path / "run"), read_recipe(load_recipe(workspace / "run"), "test")
    plan = json.loads(run.layout.plan.read_text())
    (tmp_path / "same.json").write_text(json.dumps(plan))
    plan["dropped"], plan["kept"] = [0, 5], [1, 2, 3, 4]
    (tmp_path / "mine.json").write_text(json.dumps(plan))

    def unfinished(plan_file: Path | None = None) -> list[str]:
        return Pipeline(run, recipe, plan_file, place=workspace).pruning.unfinished()

    assert unfinished() == unfinished(tmp_path / "same.json") == []
    assert unfinished(tmp_path / "mine.json") == ["selection", "transfer"]
    run.layout.plan.write_text(json.dumps(plan))
    assert unfinished() == ["transfer"]


@BREADTH
def test_changed_recipe_redoes_only_what_depends_on_it(workspace, report):
    again = job(workspace, "--set", "bench.new_tokens=3")
    assert again.code == 0, again.stderr
    assert steps(again.stderr, "started") == {"bench-ort-cpu-fp32"}


def test_stages_are_commands_over_the_same_run(workspace, report):
    for command in ("export", "build", "bench", "evaluate"):
        done = trsp_deploy(command, "run", "--json", cwd=workspace)
        assert done.code == 0, done.stderr
        assert steps(done.stderr, "started") <= {"bench-ort-cpu-fp32"}
        json.loads(done.stdout.splitlines()[-1])
    done = trsp_deploy("clean", "run", "--keep", "dense,pruned,onnx,engines", cwd=workspace)
    assert done.code == 0 and not (workspace / "run" / "report.md").exists()
    done = trsp_deploy("report", "run", cwd=workspace)
    assert done.code == 0 and "report.md" in done.stdout
    assert trsp_deploy("verify", "run", cwd=workspace).code == 0


@BREADTH
def test_plan_edited_by_hand_is_applied(workspace, report):
    path = workspace / "run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["dropped"], plan["kept"] = [0, 5], [1, 2, 3, 4]
    path.write_text(json.dumps(plan))
    done = job(workspace, "--json")
    assert done.code == 0, done.stderr
    assert "plan.json was edited by hand: dropping 0, 5" in done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["dropped_layers"] == [0, 5] and model["layers_edited"] and not report["model"]["layers_edited"]
    assert f"dropped 0, 5; edited by hand after {plan['method']})" in (workspace / "run" / "report.md").read_text()
    redone = steps(done.stderr, "started")
    assert "export-dense-fp32" not in redone
    assert {"prune", "export-pruned-fp32", "evaluate-manual-pruned"} <= redone


@BREADTH
def test_plan_handed_in_is_applied(workspace, report, tmp_path):
    plan = json.loads((workspace / "run" / "plan.json").read_text())
    plan["dropped"], plan["kept"] = [2], [0, 1, 3, 4, 5]
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    options = ["--model", "tiny-llama", "--calibration", "train.txt", "--plan", str(tmp_path / "mine.json")]
    changes = [*QUICK, "transfer.form=none", "engines=[ort-cpu-fp32]"]
    settings = [option for pair in changes for option in ("--set", pair)]
    done = trsp_deploy("prune", *options, *settings, "--out", str(tmp_path / "run"), "--json", cwd=workspace)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["dropped"] == [2]
    again = trsp_deploy("export", str(tmp_path / "run"), cwd=workspace)  # later commands know the run alone
    assert again.code == 0, again.stderr
    assert not {"plan", "prune"} & steps(again.stderr, "started")
    assert "plan.json was given, not chosen here: dropping 2; delete it" in again.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["dropped"] == [2]
    plan["dropped"], plan["kept"] = [3], [0, 1, 2, 4, 5]
    (tmp_path / "mine.json").write_text(json.dumps(plan))
    other = trsp_deploy("prune", *options, *settings, "--out", str(tmp_path / "run"), "--json", cwd=workspace)
    assert json.loads(other.stdout)["dropped"] == [3] and {"plan", "prune"} <= steps(other.stderr, "started")
    (tmp_path / "run" / "plan.json").unlink()
    chosen = trsp_deploy("export", str(tmp_path / "run"), cwd=workspace)
    assert chosen.code == 0 and "plan" in steps(chosen.stderr, "started"), chosen.stderr
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["dropped"] == report["model"]["dropped_layers"]
    assert "was given" not in trsp_deploy("export", str(tmp_path / "run"), cwd=workspace).stderr
