"""Which rows there are. To add a method, an arm or a budget, add a line here: rows in the file stay valid.

A selection is a recipe's `plan`, an arm a selection and a recipe's `transfer`. `default` is whatever the recipe of a
budget's size says (`RECIPES`), with this table's texts and budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field

from benchmarks.quality.rows import Kind, Row, Subject
from trsp_deploy.recipe import METHODS, Strict
from trsp_deploy.tools.library import load_recipe_values

RECIPE: dict[str, Any] = load_recipe_values("smollm2-135m")[0]
RECIPES: dict[int, str] = {32: "smollm2-135m", 128: "smollm2-135m-131k", 512: "smollm2-135m-524k"}  # by steps
BATCH_SIZE = 4  # windows a training step
# What every arm has in common with the default one: loss and optimiser, so that equal tokens are equal training.
SHARED: dict[str, Any] = {
    key: value
    for key, value in RECIPE["transfer"].items()
    if key in ("ce_weight", "kl_weight", "learning_rate", "warmup_share", "train", "optimizer")
}


class Selector(Strict):
    """How layers are chosen."""

    plan: dict[str, Any]
    windows: int  # calibration windows that it reads
    # Its picks for fewer layers are the first of its picks for more, and its plan holds their order.
    greedy: bool = False


class Way(Strict):
    """What happens around the removal, and on which text."""

    transfer: dict[str, Any]
    self_generated: float = 0.0  # share of the training text that the dense model writes
    test_sources: dict[str, float] = Field(default_factory=dict)  # as of a row


class Arm(Strict):
    """A selection, and a way to remove what it chose."""

    name: str
    label: str  # for tables and plots
    selection: str
    way: Way
    at: dict[int, Way] = Field(default_factory=dict)  # another one at some budgets, by steps
    every_seed: bool = False  # before the others of a budget; else the first seed alone
    every_budget: bool = False  # else up to the zero-shot rows': larger budgets take longer than all the rest


class Table(Strict):
    """A set of rows: the full table or the quick one."""

    subject: Subject
    selectors: dict[str, Selector]
    drop: int  # layers
    counts: tuple[int, ...]  # layers, of the curve
    arms: tuple[Arm, ...]  # trained
    untrained: tuple[Arm, ...]
    steps: tuple[int, ...]  # budgets, each BATCH_SIZE windows a step
    seeds: tuple[int, ...]  # of the trained rows that the targets compare; the others take the first
    selections: tuple[str, ...]  # those compared over `selection_seeds`
    selection_seeds: tuple[int, ...]
    zero_shot_steps: int
    zero_shot_arms: tuple[str, ...]
    zero_shot_every_seed: tuple[str, ...]  # of them, those that `seeds` ask; the others answer with the first
    tasks: tuple[str, ...]
    items: int  # of each task


SELECTORS: dict[str, Selector] = {
    "default": Selector(plan=RECIPE["plan"], windows=16),
    "sleb": Selector(plan={"method": "sleb"}, windows=16, greedy=True),  # as much text as the default reads
    "shortgpt": Selector(plan={"method": "shortgpt"}, windows=128),  # one pass is cheap
    "uidl": Selector(plan={"method": "uidl"}, windows=128),
    "fold": Selector(plan={"method": "fold"}, windows=128),
    "paper": Selector(plan=METHODS["trsp"]["plan"], windows=128),
}

PLAIN: dict[str, Any] = {"form": "none", "refit": "none"}
SPAN: dict[str, Any] = {"form": "none", "refit": "span"}
LAYERS: dict[str, Any] = {"form": "none", "refit": "layers"}
TRAIN: dict[str, Any] = {**SHARED, "form": "train", "refit": "none"}
FOLD: dict[str, Any] = {**TRAIN, "refit": "span"}
# As published: penalty, loss, rate and what trains are the paper's or its released scripts'.
PAPER: dict[str, Any] = METHODS["trsp"]["transfer"]
PENALTY: dict[str, Any] = {**SHARED, "form": "l2", "refit": "none", "weight": PAPER["weight"]}
OWN = 0.25  # of the text, where an arm reads some that the dense model wrote: what did best (docs/log.md)
# Beside the targets' terms, which are training on the calibration text alone: what real text of another use brings.
INSTRUCTIONS = {"alpaca": 0.5}

UNTRAINED: tuple[Arm, ...] = (
    # Not what the recipes do before their training, which is a fold: the best that is known without any training.
    Arm(
        name="layers",
        label="default's layers, refitted",
        selection="default",
        way=Way(transfer=LAYERS),
        every_seed=True,
    ),
    Arm(name="sleb", label="SLEB", selection="sleb", way=Way(transfer=PLAIN), every_seed=True),
    Arm(name="trsp", label="default's layers, only removed", selection="default", way=Way(transfer=PLAIN)),
    Arm(name="paper", label="the paper's gates, layers only removed", selection="paper", way=Way(transfer=PLAIN)),
    Arm(name="shortgpt", label="ShortGPT", selection="shortgpt", way=Way(transfer=PLAIN)),
    Arm(name="uidl", label="UIDL", selection="uidl", way=Way(transfer=PLAIN)),
    Arm(name="fold", label="fold", selection="fold", way=Way(transfer=SPAN)),
    Arm(name="fold-layers", label="fold's span, layers refitted", selection="fold", way=Way(transfer=LAYERS)),
)


def _default(recipe: dict[str, Any]) -> Way:
    return Way(transfer=recipe["transfer"], self_generated=recipe["calibration"].get("self_generated", 0.0))


def _control(default: Way) -> Way:
    """Removed first, then trained: on the same text."""
    return Way(transfer=TRAIN, self_generated=default.self_generated)


DEFAULTS: dict[int, Way] = {steps: _default(load_recipe_values(name)[0]) for steps, name in RECIPES.items()}
CONTROLS: dict[int, Way] = {steps: _control(way) for steps, way in DEFAULTS.items()}

# The default and its control are rows of the four arms below them: at each budget, of the text that its recipe reads.
ARMS: tuple[Arm, ...] = (
    Arm(
        name="default",
        label="TRSP, default",
        selection="default",
        way=_default(RECIPE),
        at=DEFAULTS,
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="control",
        label="control: remove, then train",
        selection="default",
        way=_control(_default(RECIPE)),
        at=CONTROLS,
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="own-text",
        label="TRSP, a quarter own text",
        selection="default",
        way=Way(transfer=FOLD, self_generated=OWN),
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="own-text-control",
        label="control, a quarter own text",
        selection="default",
        way=Way(transfer=TRAIN, self_generated=OWN),
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="given-text",
        label="TRSP, given text alone",
        selection="default",
        way=Way(transfer=FOLD),
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="given-text-control",
        label="control, given text alone",
        selection="default",
        way=Way(transfer=TRAIN),
        every_seed=True,
        every_budget=True,
    ),
    Arm(
        name="instructions",
        label="TRSP, half instructions",
        selection="default",
        way=Way(transfer=FOLD, test_sources=INSTRUCTIONS),
        every_seed=True,
    ),
    Arm(
        name="instructions-control",
        label="control, half instructions",
        selection="default",
        way=Way(transfer=TRAIN, test_sources=INSTRUCTIONS),
        every_seed=True,
    ),
    Arm(
        name="refit-anneal",
        label="TRSP, layers refitted, annealed",
        selection="default",
        way=Way(transfer={**SHARED, "form": "anneal", "refit": "layers", "anneal_share": 0.1}),
        every_seed=True,
        every_budget=True,
    ),
    Arm(name="refit", label="refit, then train", selection="default", way=Way(transfer={**TRAIN, "refit": "layers"})),
    Arm(
        name="anneal",
        label="TRSP, annealed",
        selection="default",
        way=Way(transfer={**SHARED, "form": "anneal", "refit": "none"}),
    ),
    Arm(name="fold", label="fold, then train", selection="fold", way=Way(transfer=FOLD), every_seed=True),
    Arm(
        name="fold-layers",
        label="fold's span, refit, then train",
        selection="fold",
        way=Way(transfer={**TRAIN, "refit": "layers"}),
    ),
    Arm(name="paper", label="TRSP as published", selection="paper", way=Way(transfer=PAPER)),
    Arm(
        name="paper-control",
        label="control of that: remove, then train",
        selection="paper",
        way=Way(transfer={**PAPER, "form": "train"}),
    ),
    # Its control is `given-text-control`.
    Arm(
        name="penalty",
        label="the paper's penalty, default's layers and loss",
        selection="default",
        way=Way(transfer=PENALTY),
    ),
    Arm(name="sleb", label="SLEB, then train", selection="sleb", way=Way(transfer=TRAIN)),
    Arm(name="shortgpt", label="ShortGPT, then train", selection="shortgpt", way=Way(transfer=TRAIN)),
    Arm(name="uidl", label="UIDL, then train", selection="uidl", way=Way(transfer=TRAIN)),
)
PAPER_ARMS = ("paper", "paper-control", "penalty")  # off the scale of what else is plotted
RIVALS = ("sleb", "shortgpt", "uidl", "fold")

FULL = Table(
    subject=Subject(
        model="smollm2-135m",
        calibration="exl-wiki",
        context_length=256,
        pool_windows=None,
        validation_windows=16,
        fit_windows=512,
        tests={"wiki": "wiki-demo", "c4": "c4-demo", "alpaca": "alpaca-demo"},
        test_context=512,
        test_windows=16,
    ),
    selectors=SELECTORS,
    drop=7,
    counts=(2, 4, 7, 10),
    arms=ARMS,
    untrained=UNTRAINED,
    steps=(32, 128, 512),  # 33k, 131k, 524k tokens
    seeds=(0, 1, 2),
    selections=("default", "sleb"),
    selection_seeds=(0, 1, 2, 3, 4),
    zero_shot_steps=128,
    zero_shot_arms=(
        "default",
        "own-text",
        "given-text",
        "given-text-control",
        "refit-anneal",
        "sleb",
        "shortgpt",
        "uidl",
        "fold",
    ),
    zero_shot_every_seed=("default", "given-text", "own-text", "fold"),  # the default on either text, its closest rival
    tasks=("piqa", "arc-easy", "arc-challenge", "sciq", "copa"),
    items=200,
)

QUICK = FULL.model_copy(
    update={
        "subject": FULL.subject.model_copy(
            update={
                "pool_windows": 64,
                "validation_windows": 4,
                "fit_windows": 24,
                "test_context": 256,
                "test_windows": 8,
            }
        ),
        "selectors": {
            name: selector.model_copy(update={"windows": 1 if name == "sleb" else 8 if name == "default" else 24})
            for name, selector in SELECTORS.items()
        },
        "counts": (),
        "arms": tuple(arm for arm in ARMS if arm.every_seed and arm.name != "refit-anneal"),
        "untrained": tuple(arm for arm in UNTRAINED if arm.name in ("layers", "sleb", "uidl")),
        "steps": (4,),
        "seeds": (0,),
        "selection_seeds": (0,),
        "zero_shot_steps": 4,
        "zero_shot_arms": ("default",),
        "tasks": ("copa",),
        "items": 20,
    }
)


def rows(table: Table, only: str = "") -> list[Row]:
    """Every row once, the most informative first; a row comes after those that it needs.

    only: take the rows whose title holds this, and what they need.
    """
    found: dict[str, Row] = {}
    for row in _with_needs(row for row in labelled_rows(table) if only in row.title):
        known = found.setdefault(row.key, row)
        if row.keep and not known.keep:
            found[row.key] = known.model_copy(update={"keep": True})
    return list(found.values())


def labelled_rows(table: Table) -> list[Row]:
    """Every row under every name that it has: two arms of the same settings are two here and one in `rows`."""
    wanted = [dense_row(table)]
    wanted += [
        pruned_row(table, "untrained", arm, seed, table.drop)
        for seed in table.seeds
        for arm in table.untrained
        if arm.every_seed or seed == table.seeds[0]
    ]
    for steps in table.steps:
        wanted += trained_rows(table, steps)
        if steps == table.zero_shot_steps:  # larger budgets take longer than all the rest
            wanted += zero_shot_rows(table)
            wanted += [selection_row(table, name, seed) for name in table.selections for seed in table.selection_seeds]
            wanted += [pruned_row(table, "curve", arm, 0, count) for count in table.counts for arm in table.untrained]
    return wanted


def dense_row(table: Table) -> Row:
    """The dense model as it comes."""
    return Row(kind="dense", arm="dense", subject=table.subject, seed=0)


def selection_row(table: Table, name: str, seed: int, drop: int | None = None) -> Row:
    """The choice of `drop` layers (None: the table's) by a selector."""
    selector, count = table.selectors[name], drop or table.drop
    return Row(
        kind="selection",
        arm=name,
        subject=table.subject,
        seed=seed,
        drop=count,
        plan=selector.plan,
        windows=selector.windows,
        selected=count,
    )


def pruned_row(table: Table, kind: Kind, arm: Arm, seed: int, drop: int, steps: int = 0) -> Row:
    """One arm at one number of layers, budget (0: no training) and seed."""
    # A greedy search holds those for fewer layers: the table's own number is searched anyway, the most only beyond it.
    greedy = table.selectors[arm.selection].greedy
    searched = (table.drop if drop <= table.drop else max(table.counts)) if greedy else drop
    chosen = selection_row(table, arm.selection, seed, searched)
    way = arm.at.get(steps, arm.way)
    transfer = {**way.transfer, "batch_size": BATCH_SIZE, **({"steps": steps} if steps else {})}
    keep = kind == "trained" and steps == table.zero_shot_steps and (arm.name, seed) in _zero_shot_models(table)
    return chosen.model_copy(
        update={
            "kind": kind,
            "arm": arm.name,
            "drop": drop,
            "transfer": transfer,
            "self_generated": way.self_generated,
            "test_sources": way.test_sources,
            "keep": keep,
        }
    )


def trained_arms(table: Table, steps: int) -> tuple[Arm, ...]:
    """The arms of a budget."""
    return tuple(arm for arm in table.arms if arm.every_budget or steps <= table.zero_shot_steps)


def trained_rows(table: Table, steps: int) -> list[Row]:
    """One budget: the arms of every seed, then the others and the dense model with the first."""
    arms, first = trained_arms(table, steps), table.seeds[0]
    pairs = [(arm, seed) for seed in table.seeds for arm in arms if arm.every_seed]
    pairs += [(arm, first) for arm in arms if not arm.every_seed]
    dense = {**TRAIN, "steps": steps, "batch_size": BATCH_SIZE}
    return [
        *(pruned_row(table, "trained", arm, seed, table.drop, steps) for arm, seed in pairs),
        Row(kind="dense-trained", arm="dense-trained", subject=table.subject, seed=first, transfer=dense),
    ]


def zero_shot_rows(table: Table) -> list[Row]:
    """The dense model and some arms, one budget."""
    asked = {"kind": "zero-shot", "tasks": table.tasks, "items": table.items, "keep": False}
    arms = {arm.name: arm for arm in table.arms}
    trained = [
        pruned_row(table, "trained", arms[name], seed, table.drop, table.zero_shot_steps)
        for name, seed in _zero_shot_models(table)
    ]
    return [row.model_copy(update=asked) for row in (dense_row(table), *trained)]


def _zero_shot_models(table: Table) -> list[tuple[str, int]]:
    """Arms and seeds whose models answer: every arm with the first seed, then some with the others."""
    first, *others = table.seeds
    pairs = [(name, first) for name in table.zero_shot_arms]
    return pairs + [(name, seed) for seed in others for name in table.zero_shot_every_seed]


def _with_needs(wanted: Iterable[Row]) -> Iterator[Row]:
    for row in wanted:
        chosen = row.selection()
        if chosen is not None:
            yield chosen
        yield row
