"""What the bench found, and one ratio for each target of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks import targets
from benchmarks.engines import subjects
from benchmarks.targets import at_least, at_most
from trsp_deploy.artifacts import Provenance
from trsp_deploy.decoder import decoder_size
from trsp_deploy.recipe import Case, Precision, Strict
from trsp_deploy.tools.graphs.stored import Stored
from trsp_deploy.tools.judging.limits import decode_bytes, speed_limit
from trsp_deploy.tools.judging.statistics import Ratio, bootstrap

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8", "int4")
PROMPT, NEW_TOKENS, ROUNDS = 128, 128, 11
LONG_PROMPT, LONG_NEW = 1900, 32
BATCH = 8
TARGETS = {
    "fp32_decode_to_genai": at_least(1.0, "fp32 decoding over onnxruntime-genai's"),
    "fp32_decode_to_optimum": at_least(1.5, "fp32 decoding over Optimum's runner of its graph"),
    "int4_decode_to_genai": at_least(1.0, "int4 decoding over onnxruntime-genai's"),
    "int4_perplexity_to_genai": at_most(1.03, "int4 perplexity over onnxruntime-genai's"),
    "int8_prefill_to_fp32": at_least(2.0, "int8 prompt over fp32's"),
    "fp32_floor_share": at_least(0.85, "fp32: bytes over measured bandwidth, over the time of a token"),
    "int8_floor_share": at_least(0.85, "int8: bytes over bandwidth, over the time of a token"),
    "int4_floor_share": at_least(0.85, "int4: bytes over bandwidth, over the time of a token"),
    "late_to_early": at_most(1.35, f"fp32: a token at past {LONG_PROMPT} over one at past {PROMPT}"),
    "batch_fp32": at_least(3.0, f"fp32: tokens/s at batch {BATCH} over batch 1"),
    "batch_int8": at_least(3.0, f"int8: tokens/s at batch {BATCH} over batch 1"),
    "batch_int4": at_least(3.0, f"int4: tokens/s at batch {BATCH} over batch 1"),
    "opt_decode_to_optimum": at_least(2.0, "random OPT-125M, fp32 decoding over Optimum's runner"),
    "gpt2_decode_to_optimum": at_least(2.0, "random GPT-2, fp32 decoding over Optimum's runner"),
    "pruned_fp32": at_least(0.95, "7 of 30 layers less, fp32: measured speed-up over its limit"),
    "pruned_int8": at_least(0.95, "7 of 30 layers less, int8: measured speed-up over its limit"),
    "pruned_int4": at_least(0.95, "7 of 30 layers less, int4: measured speed-up over its limit"),
}
Samples = dict[str, list[dict[str, Any]]]  # contender -> one block a round


def processor_name(cpu: str, vnni: bool) -> str:
    """A processor's name, and what that does not say."""
    return cpu if vnni else f"{cpu} without VNNI"


class Found(Strict):
    """What a run of the bench found: raw samples and what they were taken on."""

    machine: Provenance
    samples: dict[str, list[dict[str, Any]]]  # contender -> one block a round
    absent: dict[str, str]  # contender -> why it took no part
    perplexity: dict[str, float]
    bandwidths: tuple[float, ...]  # bytes/s that the machine read in each round of the first race
    peers: dict[str, str] = Field(default_factory=dict)  # versions in the peers' environment
    stored: dict[Precision, Stored]  # our engines
    vnni: bool = True  # whether integer products are quick and exact: processors of one name differ in it

    @property
    def processor(self) -> str:
        """Its name, and what that does not say."""
        return processor_name(self.machine.cpu, self.vnni)

    @property
    def bandwidth(self) -> float:
        """Bytes/s, over the rounds."""
        return float(np.median(self.bandwidths))


def figures(found: Found) -> dict[str, float | None]:
    """One number for each target; None where something that it needs was not there."""
    values = ratios(found.samples, found.bandwidths, found.perplexity, found.stored)
    return {name: None if value is None else value.ratio for name, value in values.items()}


def ratios(
    samples: Samples, bandwidths: Sequence[float], perplexities: dict[str, float], ours: Mapping[Precision, Stored]
) -> dict[str, Ratio | None]:
    """What each target is held against; None where something that it needs was not there."""

    def times(label: str, part: str = "decode_s") -> list[float]:
        return [float(np.median(block[part])) for block in samples[label]]

    def ratio(slow: str, quick: str, part: str = "decode_s") -> Ratio | None:
        there = slow in samples and quick in samples
        return paired_ratio(times(slow, part), times(quick, part)) if there else None

    def batch(precision: str) -> Ratio | None:
        found = ratio(f"ours {precision}, batch 1", f"ours {precision}, batch {BATCH}")
        return None if found is None else _scaled(found, BATCH)

    def kept(precision: Precision) -> Ratio | None:
        dense, pruned = (decoder_size(subjects.model(name)) for name in ("dense", "pruned"))
        case = Case(batch_size=1, prompt_tokens=PROMPT, new_tokens=NEW_TOKENS)
        limit = speed_limit(dense, pruned, ours[precision], case)
        found = ratio(f"ours {precision}", f"pruned {precision}")
        return None if found is None else _scaled(found, 1 / limit.decode.ratio)

    def floor(precision: Precision) -> Ratio | None:
        label, past = f"ours {precision}", PROMPT + NEW_TOKENS // 2
        read = decode_bytes(decoder_size(subjects.model("dense")), ours[precision], 1, past)
        return paired_ratio([read / each for each in bandwidths], times(label)) if label in samples else None

    genai4, ours4 = perplexities.get("genai int4"), perplexities.get("ours int4")
    lost = None if genai4 is None or ours4 is None else ours4 / genai4
    values = {
        "fp32_decode_to_genai": ratio("genai fp32", "ours fp32"),
        "fp32_decode_to_optimum": ratio("optimum fp32", "ours fp32"),
        "int4_decode_to_genai": ratio("genai int4", "ours int4"),
        "int4_perplexity_to_genai": None if lost is None else Ratio(ratio=lost, low=lost, high=lost),
        "int8_prefill_to_fp32": ratio("ours fp32", "ours int8", "prefill_s"),
        **{f"{precision}_floor_share": floor(precision) for precision in PRECISIONS},
        "late_to_early": ratio(f"ours fp32, past {LONG_PROMPT}", "ours fp32, batch 1"),
        **{f"batch_{precision}": batch(precision) for precision in PRECISIONS},
        "opt_decode_to_optimum": ratio("optimum opt-125m", "ours opt-125m"),
        "gpt2_decode_to_optimum": ratio("optimum gpt2", "ours gpt2"),
        **{f"pruned_{precision}": kept(precision) for precision in PRECISIONS},
    }
    return {name: values[name] for name in TARGETS}


def paired_ratio(slow: Sequence[float], quick: Sequence[float]) -> Ratio:
    """exp of the median log ratio of paired blocks, in seconds; the same index is the same moment."""
    logs = np.log(np.asarray(slow) / np.asarray(quick))
    low, high = (float(logs[0]),) * 2 if np.ptp(logs) == 0 else bootstrap(np.median, logs)
    return Ratio(ratio=float(np.exp(np.median(logs))), low=math.exp(low), high=math.exp(high))


def _scaled(found: Ratio, factor: float) -> Ratio:
    return Ratio(ratio=factor * found.ratio, low=factor * found.low, high=factor * found.high)


def verdict(values: dict[str, float | None]) -> dict[str, Any]:
    """The line for scripts."""
    return targets.verdict("engines", TARGETS, values, decimals=3)
