"""The README.md of a pruned checkpoint, with the metadata that hubs read."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from trsp_deploy import __version__
from trsp_deploy.recipe import Recipe
from trsp_deploy.results import PrunedCheckpoint
from trsp_deploy.tools.models import SHORT_NAMES, ModelSource
from trsp_deploy.tools.plan import PruningPlan

TEXT = """---
{metadata}
---

# {name}

{base} with {dropped_count} of its {num_layers} transformer layers removed by TRSP
([arXiv 2505.18232](https://arxiv.org/abs/2505.18232)), made with trsp_deploy {version}.
It loads with plain `transformers`; no code of trsp_deploy is needed.

| | dense | pruned |
|---|---|---|
| layers | {num_layers} | {kept_count} |
| parameters | {parameters_dense:,} | {parameters_pruned:,} ({parameter_share:.1%} fewer) |
| perplexity on held-out calibration text | {ppl_dense:.2f} | {ppl_after:.2f} (before removal {ppl_before:.2f}) |

- Removed layers, as indices of the dense model: {dropped}.
- Selection: {method}, seed {seed}, calibrated on {calibration}.
- Transfer: `{form}`, {tokens:,} tokens, learning rate {learning_rate:g}.

Removing a quarter of a model's layers costs quality: check it on your own task before use.
"""


def write_model_card(
    folder: Path, source: ModelSource, plan: PruningPlan, recipe: Recipe, result: PrunedCheckpoint
) -> None:
    """Write `folder`/README.md."""
    base = source.origin.partition("@")[0] if source.kind == "hub" else source.name
    # A packaged model is one of the hub's, too.
    hub_id = base if source.kind == "hub" else SHORT_NAMES.get(base)
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        library_name="transformers",
        license=source.licence.lower() if source.licence else None,
        pipeline_tag="text-generation",
        tags=["trsp", "depth-pruning", "trsp_deploy"],
    )
    card = TEXT.format(
        metadata=metadata.to_yaml(),
        name=f"{base.rpartition('/')[2]}-trsp-{len(plan.dropped)}of{plan.num_layers}",
        base=base,
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
        calibration=plan.calibration,
        form=recipe.transfer.form,
        tokens=result.tokens,
        learning_rate=recipe.transfer.learning_rate,
    )
    ModelCard(card).save(folder / "README.md")
