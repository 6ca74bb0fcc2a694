"""The bench's tables: for a terminal, for docs/engines.md and for the README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import targets
from benchmarks.engines.figures import BATCH, LONG_NEW, NEW_TOKENS, PROMPT, TARGETS, Found, figures, ratios
from benchmarks.pages import markdown
from trsp_deploy.tools.judging.statistics import Ratio

HEAD = ("", "prompt ms", "token ms", "tokens/s", "peak MB", "perplexity")


def rows(found: Found) -> list[list[str]]:
    """One line a contender: medians over rounds."""
    return [[label, *_cells(label, blocks, found.perplexity)] for label, blocks in found.samples.items()]


def _cells(label: str, blocks: list[dict[str, Any]], perplexity: dict[str, float]) -> list[str]:
    token_s = _median(np.median(block["decode_s"]) for block in blocks)
    texts = BATCH if label.endswith(f"batch {BATCH}") else 1
    peaks = [block["peak_rss_bytes"] for block in blocks if block["peak_rss_bytes"]]
    prompt_ms = 1e3 * _median(block["prefill_s"] for block in blocks)
    lost = f"{perplexity[label]:.2f}" if label in perplexity else ""
    return [
        f"{prompt_ms:.1f}",
        f"{1e3 * token_s:.2f}",
        f"{texts / token_s:.1f}",
        f"{max(peaks) / 1e6:.0f}" if peaks else "",
        lost,
    ]


def text(found: Found) -> str:
    """The table for a terminal."""
    lines = [f"{name:24}{''.join(f'{cell:>11}' for cell in cells)}" for name, *cells in (list(HEAD), *rows(found))]
    lines += [f"{label:24} not measured: {reason}" for label, reason in found.absent.items()]
    return "\n".join([*lines, f"memory bandwidth {found.bandwidth / 1e9:.1f} GB/s"])


def markdown_text(found: Found) -> str:
    """The table for a page, and every target with what was measured."""
    values = ratios(found.samples, found.bandwidths, found.perplexity, found.stored)
    intervals = {name: _with_interval(value) for name, value in values.items() if value is not None}
    machine = found.machine
    # onnxruntime-gpu goes by another name; of the others there is none where their environment is not.
    versions = {**machine.packages, **{f"peers' {name}": version for name, version in found.peers.items()}}
    told = ("onnxruntime", "onnxruntime-gpu", "torch", "peers' onnxruntime-genai", "peers' llama-cpp-python")
    packages = ", ".join(f"{name} {versions[name]}" for name in told if name in versions)
    return "\n\n".join(
        [
            f"**{found.processor}**, {machine.cores} cores. SmolLM2-135M unless named otherwise, prompt {PROMPT}, "
            f"{NEW_TOKENS} new tokens ({LONG_NEW} where a batch or a past is named), "
            f"medians of {len(found.samples['ours fp32'])} rounds in turn; "
            f"{found.bandwidth / 1e9:.0f} GB/s, {packages}. "
            "Perplexity: 8 windows of 512 tokens of wiki-demo.",
            markdown(HEAD, rows(found)),
            *(f"{label}: not measured ({reason})." for label, reason in found.absent.items()),
            targets.table(TARGETS, figures(found), cells=intervals),
        ]
    )


def short_text(found: Found) -> str:
    """The README's: SmolLM2-135M at batch 1, all of one race."""
    shown = [row for row in rows(found) if not row[0].endswith(("opt-125m", "gpt2")) and "," not in row[0]]
    return f"{found.processor}, {found.machine.cores} cores:\n\n{markdown(HEAD, shown)}"


def _with_interval(found: Ratio) -> str:
    return found.text(".3f", unit="") if found.low < found.high else f"{found.ratio:.3f}"


def _median(values: Iterator[float]) -> float:
    return float(np.median(list(values)))
