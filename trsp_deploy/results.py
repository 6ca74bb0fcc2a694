"""What the stages produce, as frozen records: raw samples are kept, statistics are derived when shown."""

from __future__ import annotations

import math
from typing import Literal

from trsp_deploy.artifacts import Provenance
from trsp_deploy.recipe import BenchSettings, Name, Precision, RelativePath, Strict

Role = Literal["dense", "pruned"]
ROLES: tuple[Role, ...] = ("dense", "pruned")
Subject = Literal["dense", "again", "pruned"]  # `again` is dense once more: the control
# The order in which two or three subjects take turns. A subject's turns have the same mean place, so that a linear
# drift cancels; and of three none has two turns on end, in which it would find its own weights in the caches (with
# A B C C B A, dense was 1.5% quicker than itself).
TURNS: dict[int, tuple[int, ...]] = {2: (0, 1, 1, 0), 3: (0, 1, 2, 1, 2, 0, 2, 0, 1)}
Phase = Literal["prefill", "decode", "total"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "total")
LARGEST_EXPONENT = 709.0  # of exp in a float


def perplexity_of(nll: float) -> float:
    """exp of a mean loss in nats; infinite where that is beyond a float."""
    return math.exp(nll) if nll < LARGEST_EXPONENT else math.inf


class PrunedCheckpoint(Strict):
    """What the transfer and the removal did. Perplexities are of held-out calibration text."""

    form: str
    refit: str = ""  # what was fitted in closed form first: span, layers or none; of runs that did not keep it ""
    unfitted_because: str = ""  # why a fold that was asked for was not made
    dropped: tuple[int, ...]
    num_layers_dense: int
    num_layers_pruned: int
    parameters_dense: int
    parameters_pruned: int
    lm_loss: tuple[float, ...]  # nats, one per step
    penalty: tuple[float, ...]  # before lambda_2, one per step; 0 in the anneal form
    tokens: int  # trained on
    ppl_dense: float
    ppl_before_removal: float
    ppl_after_removal: float


class OnnxModel(Strict):
    """One exported model."""

    role: Role
    precision: Precision
    folder: RelativePath  # below the run folder; holds model.onnx
    size_bytes: int  # graph and external data
    external_data: tuple[RelativePath, ...]  # files beside the graph; a protobuf file ends at 2 GB
    exporter: str = ""  # that made it; empty in records of earlier code


class Parity(Strict):
    """How far an engine is from fp32 PyTorch."""

    subject: str  # "onnx" or the engine's name
    role: Role
    precision: Precision
    max_error: float  # in standard deviations of the reference's logits
    tolerance: float
    tokens_compared: int
    tokens_equal: int
    ppl_ratio: float | None = None  # over PyTorch's, of the prompts and what follows; None in files older than this key
    ppl_tolerance: float | None = None  # share that it may be off by; None where it is not judged
    passed: bool


class PerplexityParity(Strict):
    """One model's perplexity through an engine over PyTorch's, on the same tokens."""

    subject: str  # the engine's name
    role: Role
    precision: Precision
    text: str
    ratio: float
    tolerance: float  # share by which the ratio may be off 1, either way


class Block(Strict):
    """Raw samples of one block: a prompt read, then `new_tokens` decoded, each on the host's clock."""

    prefill_s: float
    decode_s: tuple[float, ...]  # one per token
    total_s: float  # end to end, choosing the tokens among it
    device_prefill_s: float | None = None  # the same by CUDA events; None on a CPU
    device_decode_s: tuple[float, ...] | None = None


class Replicate(Strict):
    """A fresh process for each subject, and cycles in which they take turns."""

    began_s: float  # since the comparison began
    together: bool  # whether the subjects were in memory at the same time
    load_s: dict[Subject, float]
    peak_rss_bytes: dict[Subject, int]
    gpu_bytes: dict[Subject, int]  # in use on the GPU beyond what was before; empty without one
    warmup_blocks: int
    blocks_per_turn: int  # of each case
    cycles_s: float  # all cycles together; the rest of the replicate was starting, loading and warming up
    order: tuple[Subject, ...]  # that TURNS counts in
    blocks: dict[Subject, tuple[tuple[Block, ...], ...]]  # by case, in the order taken

    @property
    def blocks_per_cycle(self) -> int:
        """Number of blocks of one subject and case in each cycle."""
        return self.blocks_per_turn * len(TURNS[len(self.order)]) // len(self.order)


class GpuTelemetry(Strict):
    """What the driver says of one GPU."""

    sm_mhz: int
    memory_mhz: int
    power_w: float
    temperature_c: int
    throttle_reasons: tuple[str, ...]
    other_processes: int
    used_bytes: int


class Telemetry(Strict):
    """The machine at one moment of a comparison."""

    at_s: float  # since the comparison began
    load: float  # runnable processes, mean of the last minute
    busy_share: float  # of all cores since the sample before
    steal_share: float  # taken by the hypervisor
    # To other processes and the hypervisor, of those that the comparison may use; None where the kernel does not tell.
    others_cores: float | None = None
    mhz: float | None
    gpu: GpuTelemetry | None = None


class Rates(Strict):
    """What this machine can do at most, measured."""

    bytes_per_s: float  # read from memory
    operations_per_s: dict[Precision, float]  # of a large matrix product


Stop = Literal["decided", "precise", "budget"]


class Comparison(Strict):
    """Dense and pruned on one engine, with every raw sample."""

    engine: str
    settings: BenchSettings
    threads: int  # cores that the processes may keep busy
    cores: int | None = None  # that they may run on, more where a container has a quota; None in files older than this
    affinity: tuple[int, ...] | None = None  # numbers of those cores; None in files older than this
    replicates: tuple[Replicate, ...]
    telemetry: tuple[Telemetry, ...]
    rates: Rates | None
    stopped: Stop
    elapsed_s: float


class ServedRequest(Strict):
    """One request to a server: streamed, and answered in full."""

    sent_s: float  # since its window began
    answered_s: tuple[float, ...]  # since it was sent, one an answer
    tokens: tuple[int, ...]  # new ones so far, one an answer


class ServedWindow(Strict):
    """A stretch of time in which one model had `concurrency` requests at once."""

    subject: Subject
    concurrency: int
    replicate: int
    began_s: float  # since the measurement began
    requests: tuple[ServedRequest, ...]


class Served(Strict):
    """Models on one server under load, with every raw sample."""

    engine: Name
    models: dict[Role, str]  # names on the server
    engines: dict[Role, str]  # SHA-256 of their manifests
    prompt_tokens: int
    new_tokens: int
    window_s: float
    concurrencies: tuple[int, ...]
    windows: tuple[ServedWindow, ...]
    telemetry: tuple[Telemetry, ...]
    load_generator: str
    server: str  # its version
    fresh: bool  # whether it was started anew for each replicate
    provenance: Provenance
    elapsed_s: float


class Perplexity(Strict):
    """Raw losses of one model on one text."""

    text: str
    role: Role
    origin: str
    context_length: int
    nll: tuple[float, ...]  # nats a token, one for each window
    documents: tuple[tuple[float, int], ...] = ()  # nats in all and tokens, one for each; empty where it is not known

    @property
    def tokens(self) -> int:
        """Tokens predicted: the first one of a window has nothing to be predicted from."""
        return len(self.nll) * (self.context_length - 1)

    @property
    def ppl(self) -> float:
        """exp of the mean loss."""
        return perplexity_of(sum(self.nll) / len(self.nll))


Metric = Literal["acc", "acc_norm"]  # acc_norm divides each choice's log likelihood by its length in characters


class TaskScore(Strict):
    """One model on one multiple-choice task, item by item, so that two models can be compared in pairs."""

    task: str
    metric: Metric
    correct: tuple[bool, ...]  # one per item, in the data set's order
    cut: int | None = None  # items that lost their beginning; None in files older than this key

    @property
    def items(self) -> int:
        """Number of items answered."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of the items answered rightly."""
        return sum(self.correct) / len(self.correct)


class ZeroShot(Strict):
    """One model on several multiple-choice tasks, without examples in the prompt."""

    role: Role
    tasks: tuple[TaskScore, ...]

    @property
    def mean_accuracy(self) -> float:
        """Mean of the tasks' accuracies: each task counts once, whatever its size."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)
