"""What the stages produce, as frozen records: raw samples are kept, statistics are derived when shown."""

from __future__ import annotations

import math
from typing import Literal

from trsp_deploy.recipe import BenchSettings, Precision, Strict

Role = Literal["dense", "pruned"]
ROLES: tuple[Role, ...] = ("dense", "pruned")


class PrunedCheckpoint(Strict):
    """What the transfer and the removal did. Perplexities are of held-out calibration text."""

    form: str
    dropped: tuple[int, ...]
    num_layers_dense: int
    num_layers_pruned: int
    parameters_dense: int
    parameters_pruned: int
    lm_loss: tuple[float, ...]  # nats, one a step
    penalty: tuple[float, ...]  # before lambda_2, one a step; 0 in the anneal form
    tokens: int  # trained on
    ppl_dense: float
    ppl_before_removal: float
    ppl_after_removal: float


class OnnxModel(Strict):
    """One exported model."""

    role: Role
    precision: Precision
    folder: str  # below the run folder; holds model.onnx
    size_bytes: int  # graph and external data
    external_data: tuple[str, ...]  # files beside the graph; a protobuf file ends at 2 GB


class Parity(Strict):
    """How far an engine is from fp32 PyTorch."""

    subject: str  # "onnx" or the engine's name
    role: Role
    precision: Precision
    max_error: float  # in standard deviations of the reference's logits
    tolerance: float
    tokens_compared: int
    tokens_equal: int
    passed: bool


class Latency(Strict):
    """Raw samples of one engine, in the order they were taken."""

    load_s: float
    prefill_s: tuple[float, ...]  # one a block
    decode_s: tuple[tuple[float, ...], ...]  # (blocks, new_tokens): one token each
    peak_rss_bytes: int
    gpu_bytes: int | None  # in use on the GPU beyond what was before; None without one


class Measurement(Strict):
    """Dense and pruned on one engine; blocks with the same index were neighbours in time."""

    engine: str
    settings: BenchSettings
    dense: Latency
    pruned: Latency


class Perplexity(Strict):
    """Raw losses of one model on one text."""

    text: str
    role: Role
    origin: str
    context_length: int
    nll: tuple[float, ...]  # nats a token, one for each window

    @property
    def tokens(self) -> int:
        """Tokens predicted: the first one of a window has nothing to be predicted from."""
        return len(self.nll) * (self.context_length - 1)

    @property
    def ppl(self) -> float:
        """exp of the mean loss."""
        return math.exp(sum(self.nll) / len(self.nll))


class TaskScore(Strict):
    """One model on one multiple-choice task, item by item, so that two models can be compared in pairs."""

    task: str
    metric: Literal["acc", "acc_norm"]  # acc_norm divides each choice's log likelihood by its length in bytes
    correct: tuple[bool, ...]  # one an item, in the data set's order

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
