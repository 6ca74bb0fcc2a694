"""Push a run's pruned checkpoint to the Hugging Face hub: `trsp-deploy push`, `prune-and-build --push-to-hub`.

    plan = plan_push(Path("runs/opt-6.7b-drop8"), "me/opt-6.7b-trsp-8of32")
    push(plan, private=True)

What goes is `pruned/` as its step made it, `plan.json`, and a model card with what the run measured. The token is
huggingface_hub's own (`hf auth login` or HF_TOKEN): it is neither asked for here nor kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trsp_deploy.artifacts import RunFolder, RunLayout, check_no_sweep, files_below, fingerprint, leaves, steps
from trsp_deploy.artifacts.layout import PLAN
from trsp_deploy.errors import RunError, UserError
from trsp_deploy.recipe import Strict
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.reports.record import Report, plan_report, removal_report
from trsp_deploy.tools.reports.rows import chosen_by
from trsp_deploy.tools.sources.hub import hub_errors, hub_problem
from trsp_deploy.tools.sources.models import is_of_a_model
from trsp_deploy.tools.sources.names import HUB_ID

CARD = "README.md"  # in the repository


class Push(Strict):
    """Everything that a push uploads."""

    repo: str
    files: dict[str, str]  # name in the repository -> file here
    card: str
    plan: str  # without what it says of this machine
    message: str
    no_figures: str | None  # why the card has none

    @property
    def names(self) -> list[str]:
        """Every file, as the repository has it."""
        return sorted([*self.files, CARD, PLAN])

    @property
    def size_bytes(self) -> int:
        """To upload."""
        made = len(self.card.encode()) + len(self.plan.encode())
        return sum(Path(path).stat().st_size for path in self.files.values()) + made

    @property
    def what(self) -> str:
        """How much it is, for people."""
        lacks = "" if self.no_figures is None else f"; the card has no figures, as {self.no_figures}"
        return f"{len(self.names)} files, {self.size_bytes / 1e6:,.1f} MB{lacks}"


def check_push(repo: str) -> None:
    """Raise UserError where a push is known to fail before anything is asked: no such name, no network, no token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not marked as exported

    _check_name(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError as problem:
        raise UserError(f"push to '{repo}': {hub_problem(problem)}") from problem
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"push to '{repo}': HF_HUB_OFFLINE is set, so the hub may not be asked")
    if get_token() is None:
        raise UserError(f"push to '{repo}': there is no token for the hub; run `hf auth login`, or set HF_TOKEN")


def plan_push(run: Path, repo: str) -> Push:
    """What would be uploaded; raises RunError where there is no checkpoint, or it is not the one that was made."""
    _check_name(repo)
    check_no_sweep(run)
    record, layout = RunFolder(run).record(steps.PRUNE), RunLayout(run)
    pruned, plan = layout.model("pruned"), layout.plan
    if record is None or not pruned.is_dir():
        raise RunError(f"{run}: has no pruned checkpoint; `trsp-deploy prune` or `prune-and-build` makes one")
    files = {file.relative_to(pruned).as_posix(): file for file in files_below(pruned)}
    if any(leaves(run, file) for file in files.values()) or fingerprint(pruned) != record.outputs.get("pruned"):
        raise RunError(f"{pruned}: is not what its step made (`trsp-deploy verify {run}`); nothing is pushed")
    if not plan.is_file() or fingerprint(plan) != record.inputs.get("plan"):
        raise RunError(f"{plan}: is not the plan that made {pruned}; `trsp-deploy prune` makes it again")
    card = (pruned / CARD).read_text(encoding="utf-8")
    report, no_figures = None, None
    try:
        report = _report(run, record.result)
    except RunError as problem:
        no_figures = str(problem)
    return Push(
        repo=repo,
        files={name: str(path) for name, path in files.items() if name != CARD},
        card=card if report is None else _with_figures(card, report, repo),
        plan=_shown_plan(plan),
        message="Pruned with trsp_deploy",
        no_figures=no_figures,
    )


def push(plan: Push, private: bool = False) -> str:
    """Make the repository where it is not there, upload everything as one commit, and return its address.

    What an earlier push left of a model goes in the same commit: transformers would load a single old file of weights
    rather than new ones in shards. Other files stay. Raises UserError with what the hub said.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[CommitOperationAdd | CommitOperationDelete]
    operations = [CommitOperationAdd(name, path) for name, path in sorted(plan.files.items())]
    operations += [CommitOperationAdd(CARD, plan.card.encode()), CommitOperationAdd(PLAN, plan.plan.encode())]
    api = HfApi()
    try:
        api.create_repo(plan.repo, private=private, exist_ok=True)
        there = api.repo_info(plan.repo)
        if private and not there.private:  # of one that was there the hub changes nothing
            raise UserError(f"push to '{plan.repo}': it is there already, and public; nothing was committed")
        left = {file.rfilename for file in there.siblings or ()} - set(plan.names)
        operations += [CommitOperationDelete(name) for name in sorted(left) if is_of_a_model(name)]
        done = api.create_commit(plan.repo, operations, commit_message=plan.message)
    except hub_errors() as problem:
        status = getattr(getattr(problem, "response", None), "status_code", 0)
        refused = "; run `hf auth login` with a token that may write there" if status in (401, 403) else ""
        raise UserError(f"push to '{plan.repo}': {hub_problem(problem)}{refused}; nothing was committed") from problem
    return str(done.commit_url)


def _check_name(repo: str) -> None:
    if HUB_ID.fullmatch(repo) is None:
        raise UserError(f"push to '{repo}': no name of a repository; expected OWNER/NAME")


def _shown_plan(file: Path) -> str:
    plan = plan_report(PruningPlan.model_validate_json(file.read_bytes()))
    of_the_hub = HUB_ID.fullmatch(plan.model) is not None and not Path(plan.model).exists()
    shown = plan if of_the_hub else plan.model_copy(update={"model": Path(plan.model).name})
    return json.dumps(shown.model_dump(mode="json"), indent=2) + "\n"


def _report(run: Path, made: dict[str, Any]) -> Report:
    """What the run measured of this very checkpoint, its step's result; raises RunError where it has not, with why."""
    path = RunLayout(run).report
    remedy = f"`trsp-deploy report {run}` makes it"
    try:
        checkpoint = PrunedCheckpoint.model_validate(made)
        report = Report.model_validate_json(path.read_bytes())
    except FileNotFoundError as problem:
        raise RunError(f"there is no {path.name}: {remedy}") from problem
    except (OSError, ValidationError) as problem:
        raise RunError(f"{path.name} cannot be read, or is of another version: {remedy} anew") from problem
    if report.model.dropped_layers != checkpoint.dropped or report.removal != removal_report(checkpoint):
        raise RunError(f"{path.name} is of another checkpoint: {remedy} anew")
    return report


def _with_figures(card: str, report: Report, repo: str) -> str:
    """The card with a table of what was measured, and the same as metadata (`model-index`)."""
    from huggingface_hub import EvalResult, ModelCard

    made = ModelCard(card)
    data: Any = made.data
    data.model_name = repo.rpartition("/")[2]
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type="perplexity",
            metric_value=round(text.pruned_ppl, 3),
        )
        for name, text in report.quality.items()
    ] or None
    rows = [
        f"| {name} | {text.dense_ppl:.2f} | {text.pruned_ppl:.2f} | {text.shown()} | {text.tokens:,} |"
        for name, text in report.quality.items()
    ]
    table = ["| perplexity on | dense | pruned | ratio (95%) | tokens |", "|---|---|---|---|---|", *rows]
    edited = [f"The removed layers were {chosen_by(report)}.", ""] if report.model.layers_edited else []
    made.text = "\n".join([made.text.rstrip(), "", *edited, "## Measured", "", *table, "", report.verdict, ""])
    return str(made)
