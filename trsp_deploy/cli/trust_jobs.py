"""The commands about files that are there: verify, sign, convert, clean, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trsp_deploy.cli.options import Json, Private, Run
from trsp_deploy.cli.terminal import Output, say

Folder = Annotated[
    Path, typer.Argument(help="Folder of a run, a sweep or an engine, or a Triton repository.", metavar="PATH")
]
RunOrSweep = Annotated[Path, typer.Argument(help="Folder of a run or a sweep.", metavar="RUN")]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", help="Check the manifest's signature too (PEM).", metavar="FILE")
]
Key = Annotated[Path, typer.Option("--key", help="Private elliptic-curve key (PEM).", metavar="FILE")]
Model = Annotated[str, typer.Argument(help="A folder, a hub id or a short name.", metavar="MODEL")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write; without it a hub model is found by its name.", metavar="DIR"),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        help="What stays: dense, pruned, onnx, engines, engines/NAME, reports, plans, checkpoints.",
        metavar="A,B",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")]
Repo = Annotated[str, typer.Argument(help="Repository on the hub.", metavar="OWNER/NAME")]
DryPush = Annotated[bool, typer.Option("--dry-run", help="Show the card and what would be uploaded; ask no hub.")]
WRONG = 2  # exit code where a file is not what its manifest says


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("verify")(verify)
    app.command("sign")(sign)
    app.command("convert")(convert)
    app.command("clean")(clean)
    app.command("push")(push)


def verify(path: Folder, public_key: PublicKey = None, as_json: Json = False) -> None:
    """Compare every file with its manifest's SHA-256; exit code 2 when one is missing, changed, unknown or outside."""
    from trsp_deploy.tools.delivery.verification import verify as verified

    found = verified(path)
    output = Output(as_json)
    against = found.against
    if against == "records":
        against = (
            "its steps' records, for it has no MANIFEST.json (`trsp-deploy report RUN` writes it)"
            if found.kind == "run"
            else "its steps' records and its runs, for it has no MANIFEST.json (the same `trsp-deploy sweep` writes it)"
        )
    output.say(
        *found.findings,
        f"{path}: {found.kind}, {found.checked} held against {against}, {len(found.findings)} wrong",
    )
    signature, whole = None, found.whole
    if public_key is not None:
        from trsp_deploy.tools.delivery.signing import check_signature

        problem = check_signature(path, public_key)
        signature, whole = problem or "valid", whole and problem is None
        output.say(f"signature: {signature}")
    output.result({**found.model_dump(mode="json"), "signature": signature, "whole": whole})
    raise typer.Exit(0 if whole else WRONG)


def sign(path: Folder, key: Key, as_json: Json = False) -> None:
    """Sign the manifest of a verified folder with a key of your own (OpenSSF's model-signing, no network)."""
    from trsp_deploy.tools.delivery.signing import sign as signed

    signature = signed(path, key)
    output = Output(as_json)
    output.say(f"{signature}: signed with {key}")
    output.result({"signature": str(signature)})


def convert(model: Model, out: Out = None, as_json: Json = False) -> None:
    """Write pickled weights as safetensors; what holds more than tensors is refused, and nothing in it runs."""
    from trsp_deploy.tools.sources.safe_copy import convert as converted

    folder = converted(model, out, say)
    output = Output(as_json)
    output.say(f"{folder}: safetensors; prune it with --model {model if out is None else folder}")
    output.result({"model": str(folder)})


def clean(run: RunOrSweep, keep: Keep = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Remove the parts of a run, or of each run of a sweep, that --keep does not name, without it leftovers alone; a
    later run makes them again."""
    from trsp_deploy.tools.resources.cleaning import clean as cleaned
    from trsp_deploy.tools.resources.cleaning import held, plan_cleaning

    with held(run) as runs:
        parts = [part.strip() for listed in keep or () for part in listed.split(",")]
        plan = plan_cleaning(runs, parts if keep else None)
        if not dry_run:
            cleaned(runs, plan)
    output = Output(as_json)
    for removal in plan.removals:
        shared = removal.size_bytes - removal.freed_bytes
        note = f", of which {shared / 1e6:,.1f} MB are in use elsewhere too" if shared else ""
        output.say(f"{run / removal.path}: {removal.size_bytes / 1e6:,.1f} MB{note}")
    if plan.redone:
        output.say(f"made again by a later run that needs them: {', '.join(plan.redone)}")
    output.say(f"{run}: {'would free' if dry_run else 'freed'} {plan.freed_bytes / 1e6:,.1f} MB")
    output.result({**plan.model_dump(mode="json"), "removed": not dry_run})


def push(run: Run, repo: Repo, private: Private = False, dry_run: DryPush = False, as_json: Json = False) -> None:
    """Push the pruned checkpoint with its model card to the Hugging Face hub (token: `hf auth login` or HF_TOKEN).

    Where the repository is there already, whatever else it holds of a model (weights, configs, tokenizer, code,
    licences) is deleted in the same commit.
    """
    from trsp_deploy.artifacts import reading_alone
    from trsp_deploy.tools.delivery.publishing import plan_push
    from trsp_deploy.tools.delivery.publishing import push as pushed

    output = Output(as_json)
    with reading_alone(run):
        plan = plan_push(run, repo)
        if dry_run:
            output.say(plan.card)
        url = None if dry_run else pushed(plan, private)
        replaced = f"{repo}: would upload {plan.what}, and delete what else of a model is there (which is not asked)"
        output.say(replaced if dry_run else f"{url}: {plan.what}")
        output.result({"repo": repo, "files": plan.names, "size_bytes": plan.size_bytes, "commit": url})
