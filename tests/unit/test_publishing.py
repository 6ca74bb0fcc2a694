"""Model cards carry what the base's card says, and a push uploads the checkpoint, here to a stand-in of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub import TOKEN, Hub, stand_in
from tests.samples import made_up, made_up_report
from trsp_deploy import cli
from trsp_deploy.artifacts import RunFolder, write_json
from trsp_deploy.errors import RunError
from trsp_deploy.recipe import Recipe, read_recipe
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.delivery import publishing
from trsp_deploy.tools.delivery.model_card import write_model_card
from trsp_deploy.tools.reports.record import removal_report
from trsp_deploy.tools.sources.models import ModelSource

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, de]
tags: [conversational, gguf, arxiv:1234.5678, endpoints_compatible]
---
# Tiny
"""
WEIGHTS = b"weights" * 1000


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with stand_in(monkeypatch) as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose checkpoint was made of a folder that has a card and a licence."""
    base, folder = tmp_path / "home" / "tiny", tmp_path / "run"
    base.mkdir(parents=True)
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_text("You may.")
    report = made_up_report(made_up())
    plan = report.plan.model_copy(update={"calibration": str(tmp_path / "private" / "train.txt")})
    result = PrunedCheckpoint(
        form="anneal",
        dropped=plan.dropped,
        num_layers_dense=8,
        num_layers_pruned=6,
        parameters_dense=1000,
        parameters_pruned=800,
        lm_loss=(),
        penalty=(),
        tokens=100,
        ppl_dense=10.0,
        ppl_before_removal=15.0,
        ppl_after_removal=15.0,
    )
    source = ModelSource(name=str(base), kind="folder", path=str(base), origin=str(base), licence="other")

    def prune() -> PrunedCheckpoint:
        (folder / "pruned").mkdir()
        (folder / "pruned" / "model.safetensors").write_bytes(WEIGHTS)
        write_model_card(folder / "pruned", source, plan, Recipe(model="tiny"), result)
        return result

    with RunFolder(folder) as made:
        (folder / "recipe.yaml").write_text("model: tiny\n")
        write_json(folder / "plan.json", plan)
        inputs = {"plan": folder / "plan.json"}
        made.step("prune", prune, PrunedCheckpoint, settings={}, inputs=inputs, outputs=["pruned"])
    write_json(folder / "report.json", report.model_copy(update={"removal": removal_report(result)}))
    return folder


def test_the_card_carries_what_holds_for_the_pruned_model_too(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(run / "pruned" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-licence", "LICENSE")
    assert data["language"] == ["en", "de"] and data["library_name"] == "transformers"
    assert data["tags"] == ["conversational", "trsp", "depth-pruning", "trsp_deploy"]
    assert data["pipeline_tag"] == "text-generation" and "base_model" not in data
    assert (run / "pruned" / "LICENSE").read_text() == "You may."
    assert "tiny with 2 of its 8 transformer layers removed" in card.text and "calibrated on train.txt" in card.text
    assert "| parameters | 1,000 | 800 (20.0% fewer) |" in card.text
    assert str(tmp_path) not in str(card), "paths of this machine are nobody's business"


def test_a_card_names_what_can_be_of_the_hub_and_no_place_that_a_trainer_wrote(run: Path, tmp_path: Path) -> None:
    result = PrunedCheckpoint.model_validate(RunFolder(run).record("prune").result)  # type: ignore[union-attr]
    base = tmp_path / "gpt2"  # named as a model of the hub, and of another one
    base.mkdir()
    (base / "README.md").write_text(
        "---\nbase_model: [/home/alice/tuned, owner/base, ./runs/1]\n"
        "datasets: [/home/alice/customers.jsonl, squad]\nlicense: other\nlicense_link: /home/alice/LICENSE\n---\n"
    )
    source = ModelSource(name=str(base), kind="folder", path=str(base), origin=str(base), licence="other")
    (tmp_path / "out").mkdir()

    def card(source: ModelSource) -> dict[str, Any]:
        write_model_card(tmp_path / "out", source, made_up_report(made_up()).plan, Recipe(model="tiny"), result)
        metadata: dict[str, Any] = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
        return metadata

    assert card(source).items() >= {"base_model": ["owner/base"], "datasets": ["squad"]}.items()
    assert "alice" not in (tmp_path / "out" / "README.md").read_text()
    (base / "README.md").write_text("---\nbase_model: /home/alice/tuned\nlicense: mit\n---\n")
    assert not {"base_model", "base_model_relation", "datasets"} & set(card(source))
    packaged = source.model_copy(update={"name": "smollm2-135m", "kind": "packaged"})
    assert card(packaged)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_push_uploads_the_checkpoint_and_what_was_measured(
    run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["push", str(run), "me/tiny", "--private", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["commit"] == f"{hub.address}/me/tiny/commit/abc"
    (created,) = hub.created
    assert created.items() >= {"name": "tiny", "organization": "me", "private": True}.items()
    assert set(hub.files) == {"LICENSE", "README.md", "model.safetensors", "plan.json"}
    assert hub.files["model.safetensors"] == WEIGHTS
    plan = json.loads(hub.files["plan.json"])
    assert plan["calibration"] == "train.txt" and str(run.parent) not in hub.files["plan.json"].decode()
    card = ModelCard(hub.files["README.md"].decode())
    assert "| text | 10.00 | 15.00 | 1.50x (1.40 to 1.60) | 1,000 |" in card.text
    assert card.data.eval_results is not None and card.data.eval_results[0].metric_value == 15.0
    assert card.data.license == "other"
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in printed.out + printed.err
    assert all(TOKEN.encode() not in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_what_an_earlier_push_left_of_a_model_goes(
    run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    """One old file of weights is what transformers would load, beside new ones in shards."""
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt", "modeling_mine.py"]
    own = [".gitattributes", "picture.png", "gguf/model.gguf"]
    hub.files.update(dict.fromkeys([*old, *own], b"old"))
    assert cli.run(["push", str(run), "me/tiny"]) == 0, capsys.readouterr().err
    assert set(hub.files) == {"LICENSE", "README.md", "model.safetensors", "plan.json", *own}


def test_a_card_that_goes_out_says_of_layers_that_they_were_edited_by_hand(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((run / "report.json").read_text())
    for edited in (False, True):
        report["model"]["layers_edited"] = edited
        (run / "report.json").write_text(json.dumps(report))
        assert cli.run(["push", str(run), "me/tiny", "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "## Measured" in said and ("The removed layers were edited by hand after trsp." in said) == edited


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"removal": {"after_ppl": 99.0}},
            "report.json is of another checkpoint: `trsp-deploy report {run}` makes it anew",
        ),
        ({"of_a_later_version": 1}, "report.json cannot be read, or is of another version: `trsp-deploy report {run}`"),
        (None, "there is no report.json: `trsp-deploy report {run}` makes it"),
    ],
)
def test_figures_of_another_checkpoint_stay_at_home(
    change: dict[str, Any] | None, why: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said: they were left out without a word."""
    path = run / "report.json"
    report = json.loads(path.read_text())
    for name, value in (change or {}).items():
        report[name] = {**report[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(report)) if change else path.unlink()
    assert cli.run(["push", str(run), "me/tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "## Measured" not in said and f"MB; the card has no figures, as {why.format(run=run)}" in said


def test_a_card_names_the_method_that_chose(run: Path, tmp_path: Path) -> None:
    report = made_up_report(made_up())
    result = PrunedCheckpoint.model_validate(RunFolder(run).record("prune").result)  # type: ignore[union-attr]
    source = ModelSource(name="tiny", kind="folder", path=str(tmp_path), origin="tiny", licence=None)
    (tmp_path / "README.md").write_text("---\ntitle: My model: v2\n---\n")  # no YAML
    (tmp_path / "out").mkdir()
    chosen = report.plan.model_copy(update={"method": "sleb"})
    write_model_card(tmp_path / "out", source, chosen, Recipe(model="tiny"), result)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "removed by sleb (SLEB, arXiv 2402.09025" in card.text and "trsp" not in card.data.to_dict()["tags"]


def test_a_licence_that_is_a_link_elsewhere_does_not_go_out(run: Path, tmp_path: Path) -> None:
    result = PrunedCheckpoint.model_validate(RunFolder(run).record("prune").result)  # type: ignore[union-attr]
    base = tmp_path / "home" / "tiny"
    (tmp_path / "secret").write_text("a key")
    (base / "NOTICE").symlink_to(tmp_path / "secret")
    source = ModelSource(name="tiny", kind="folder", path=str(base), origin="tiny", licence=None)
    (tmp_path / "out").mkdir()
    write_model_card(tmp_path / "out", source, made_up_report(made_up()).plan, Recipe(model="tiny"), result)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"LICENSE", "README.md"}


@pytest.mark.parametrize(
    ("form", "refit", "tokens", "said"),
    [
        ("none", "none", 0, "no training."),
        ("train", "none", 4096, "4,096 tokens, learning rate 0.0003."),
        ("none", "span", 0, "after the removed spans were folded into the projections before them, no training."),
        ("none", "layers", 0, "after every kept layer behind the first removed one was refitted, no training."),
    ],
)
def test_a_card_says_what_was_fitted_and_a_learning_rate_where_something_trained(
    run: Path, tmp_path: Path, form: str, refit: str, tokens: int, said: str
) -> None:
    result = PrunedCheckpoint.model_validate(RunFolder(run).record("prune").result)  # type: ignore[union-attr]
    source = ModelSource(name="tiny", kind="folder", path=str(tmp_path), origin="tiny", licence=None)
    (tmp_path / "out").mkdir()
    chosen = read_recipe({"model": "tiny", "transfer": {"form": form}}, "test")
    done = result.model_copy(update={"form": form, "refit": refit, "tokens": tokens})
    write_model_card(tmp_path / "out", source, made_up_report(made_up()).plan, chosen, done)
    assert f"- Transfer: `{form}`, {said}\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_asks_no_hub(run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["push", str(run), "me/tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "me/tiny: would upload 4 files" in said and "## Measured" in said
    assert not hub.tokens and not hub.files


def test_nobody_makes_a_checkpoint_anew_while_it_is_pushed(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old weights and a new config would be one commit."""
    with RunFolder(run):
        assert cli.run(["push", str(run), "me/tiny"]) == 1
    assert f"{run}: in use by another trsp-deploy" in capsys.readouterr().err and not hub.files

    def upload(*_: object) -> str:
        with pytest.raises(RunError, match="in use by another"), RunFolder(run):
            pass
        return "uploaded"

    monkeypatch.setattr(publishing, "push", upload)
    assert cli.run(["push", str(run), "me/tiny"]) == 0 and "uploaded: 4 files" in capsys.readouterr().out


def test_a_run_that_cannot_be_written_is_pushed_too(run: Path, hub: type[Hub]) -> None:
    (run / ".lock").unlink()
    (run / ".lock").symlink_to("elsewhere")  # nothing that a lock may be held by
    assert cli.run(["push", str(run), "me/tiny"]) == 0 and hub.files["model.safetensors"] == WEIGHTS


def test_what_is_not_pushed(run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    def line(*arguments: str) -> str:
        assert cli.run(["push", *arguments]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "expected OWNER/NAME" in line(str(run), "tiny")
    assert "has no pruned checkpoint" in line(str(run.parent), "me/tiny")
    hub.status = 401
    assert "hf auth login" in line(str(run), "me/tiny")
    hub.status = 503
    assert "nothing was committed" in line(str(run), "me/tiny")
    hub.status, hub.private = 200, False
    assert "is there already, and public" in line(str(run), "me/tiny", "--private")
    plan = (run / "plan.json").read_text()
    (run / "plan.json").write_text(plan + " ")
    assert "is not the plan that made" in line(str(run), "me/tiny")
    (run / "plan.json").write_text(plan)
    (run / "pruned" / "more.py").write_text("import os")
    assert "is not what its step made" in line(str(run), "me/tiny")
    assert not hub.files
