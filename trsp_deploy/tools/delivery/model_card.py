"""The README.md of a pruned checkpoint, with the metadata that hubs read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not marked as exported

from trsp_deploy import __version__
from trsp_deploy.model_code import model_code
from trsp_deploy.recipe import Recipe, shown_name
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.methods import METHODS
from trsp_deploy.tools.plan import PruningPlan
from trsp_deploy.tools.sources.model_folders import LEGAL_FILES, goes_along
from trsp_deploy.tools.sources.models import ModelSource, card_metadata
from trsp_deploy.tools.sources.names import SHORT_NAMES

TAGS = ("depth-pruning", "trsp_deploy")
TRSP = "TRSP ([arXiv 2505.18232](https://arxiv.org/abs/2505.18232))"
# What the base's card says that holds for the pruned model as well, beside its licence and tags.
CARRIED = ("language", "license_name")
# Tags of other formats, and of services that run the base itself.
NOT_CARRIED = re.compile(
    r"(?i)(gguf|onnx|openvino|mlx|safetensors|pytorch|tf|jax|flax|transformers\.js|.*:.*|.*_compatible)$"
)

FITTED = {  # in closed form, before the transfer
    "span": "after the removed spans were folded into the projections before them, ",
    "layers": "after every kept layer behind the first removed one was refitted, ",
}
PLAIN = "It loads with plain `transformers`; no code of trsp_deploy is needed."
CUSTOM = """Its architecture is code of the base model's, which lies beside the weights:
{files}.
It runs with your rights when transformers is told `trust_remote_code=True`, as it has to be: read it first."""

TEXT = """---
{metadata}
---

# {name}

{base} with {dropped_count} of its {num_layers} transformer layers removed by {by}, made with trsp_deploy {version}.
{loading}

| | dense | pruned |
|---|---|---|
| layers | {num_layers} | {kept_count} |
| parameters | {parameters_dense:,} | {parameters_pruned:,} ({parameter_share:.1%} fewer) |
| perplexity on held-out calibration text | {ppl_dense:.2f} | {ppl_after:.2f} (before removal {ppl_before:.2f}) |

- Removed layers, as indices of the dense model: {dropped}.
- Selection: {method}, seed {seed}, calibrated on {calibration}.
- Transfer: `{form}`, {refit}{trained}.

Removing layers costs quality: check it on your own task before use.
"""


def write_model_card(
    folder: Path, source: ModelSource, plan: PruningPlan, recipe: Recipe, result: PrunedCheckpoint
) -> None:
    """Write `folder`/README.md, and copy the files of the base's licence beside it."""
    # A path says nothing to others, and something about this machine.
    name = Path(source.origin).name if source.kind == "folder" else source.name
    base = source.origin.partition("@")[0] if source.kind == "hub" else name
    carried = card_metadata(Path(source.path))
    # A packaged model is one of the hub's, too; and a folder's card may name what it was made of.
    packaged = SHORT_NAMES.get(base) if source.kind == "packaged" else None
    hub_id = base if source.kind == "hub" else packaged or _of_the_hub(carried.get("base_model"))
    for file in sorted(Path(source.path).glob("*")):
        if file.is_file() and LEGAL_FILES.fullmatch(file.name) and goes_along(Path(source.path), file):
            shutil.copyfile(file, folder / file.name)
    code = model_code(folder)
    own_tags = ("trsp", *TAGS) if plan.method == "trsp" else TAGS
    tags = [tag for tag in carried.get("tags") or () if isinstance(tag, str) and not NOT_CARRIED.fullmatch(tag)]
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        license=source.licence.lower() if source.licence else None,
        license_link=shown_name(str(carried["license_link"])) if carried.get("license_link") else None,
        datasets=_of_the_hub(carried.get("datasets")),
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *own_tags, *(["custom_code"] if code else [])])),
        **{key: carried[key] for key in CARRIED if carried.get(key)},
    )
    card = TEXT.format(
        metadata=metadata.to_yaml(),
        name=f"{base.rpartition('/')[2]}-{plan.method}-{len(plan.dropped)}of{plan.num_layers}",
        base=base,
        by=_by(plan.method),
        loading=CUSTOM.format(files=", ".join(f"`{file}`" for file in code.files)) if code else PLAIN,
        version=__version__,
        dropped=", ".join(map(str, plan.dropped)),
        dropped_count=len(plan.dropped),
        kept_count=len(plan.kept),
        num_layers=plan.num_layers,
        parameters_dense=result.parameters_dense,
        parameters_pruned=result.parameters_pruned,
        parameter_share=1 - result.parameters_pruned / result.parameters_dense,
        ppl_dense=result.ppl_dense,
        ppl_before=result.ppl_before_removal,
        ppl_after=result.ppl_after_removal,
        method=plan.method,
        seed=plan.seed,
        calibration=shown_name(plan.calibration),
        form=recipe.transfer.form,
        refit=FITTED.get(result.refit, ""),
        trained=_trained(result, recipe),
    )
    ModelCard(card).save(folder / "README.md")


def _of_the_hub(named: Any) -> list[str] | None:
    """What the base's card names that can be a repository; a trainer's card names places of its own machine, too."""
    names = named if isinstance(named, list) else [named]
    return [name for name in names if isinstance(name, str) and _can_be_repository(name)] or None


def _can_be_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _trained(result: PrunedCheckpoint, recipe: Recipe) -> str:
    if not result.tokens:
        return "no training"
    return f"{result.tokens:,} tokens, learning rate {recipe.transfer.learning_rate:g}"


def _by(method: str) -> str:
    """A method with its source; of a plan made by hand its own words."""
    if method == "trsp":
        return TRSP
    return f"{method} ({METHODS[method].source})" if method in METHODS else method
