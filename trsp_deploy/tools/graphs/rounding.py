"""Weights in 4 bits, blocks of them sharing a scale, so that a product loses least on a calibration text.

GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1): inputs are rounded one after the other, and what rounding one
loses is made up for by those that are not rounded yet, as far as the text has them go together. A block's scale is the
one of a few that loses least, each input counting by its power.

Every token counts alike, whatever its size (`Activations.of` scales them): the few massive ones of an attention sink
would else decide everything, and GPTQ then gains little or loses (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_TOGETHER = 1024  # inputs that make up for each other; work and memory grow with it, and the gain does not
DAMPING = 0.01  # of the mean power, added to every input's: section 3.3 of the paper
LEVELS = 16
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # of a block's range: tried as the range of the 16 numbers


@dataclass(frozen=True)
class Rounded:
    """A weight (in, out) as `(codes - zeros) * scales`, a row of scales and zeros for each block of inputs."""

    codes: np.ndarray  # (in, out) uint8, 0 to 15
    scales: np.ndarray  # (blocks, out), of the weight's own type
    zeros: np.ndarray  # (blocks, out) uint8; 8 everywhere where the scale is symmetric


def parts(inputs: int) -> list[slice]:
    """The inputs of a product that make up for each other: spans of at most MOST_TOGETHER."""
    return [slice(begin, min(begin + MOST_TOGETHER, inputs)) for begin in range(0, inputs, MOST_TOGETHER)]


def round_weight(
    weight: np.ndarray, block_size: int, moments: Sequence[np.ndarray] | None, *, symmetric: bool
) -> Rounded:
    """Round a weight (in, out) in blocks of `block_size` inputs, a divisor of MOST_TOGETHER; the last may be shorter.

    moments: for each of `parts(in)` the second moments (part, part) of its inputs on a text; None without a text, and
    then every weight goes to its nearest number. symmetric: no zero points, as TensorRT reads it.
    """
    inputs, outputs = weight.shape
    blocks = -(-inputs // block_size)
    rounded = Rounded(
        np.empty((inputs, outputs), np.uint8),
        np.empty((blocks, outputs), weight.dtype),
        np.empty((blocks, outputs), np.uint8),
    )
    left = weight.astype(np.float32)  # a copy: what is still to be rounded, errors of what is rounded made up for
    for number, part in enumerate(parts(inputs)):
        power, inverse = _for_part(None if moments is None else moments[number], part.stop - part.start)
        for begin in range(part.start, part.stop, block_size):
            block = slice(begin, min(begin + block_size, part.stop))
            inside = slice(block.start - part.start, block.stop - part.start)
            scale, zero = _grid(left[block], power[inside, None], weight.dtype, symmetric)
            rounded.scales[begin // block_size], rounded.zeros[begin // block_size] = scale, zero
            errors = _round_block(left[block], scale.astype(np.float32), zero, inverse[inside, inside], rounded, block)
            left[block.stop : part.stop] -= inverse[inside, inside.stop :].T @ errors
    return rounded


def _for_part(moments: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Power of each input (size,), and the upper Cholesky factor (size, size) of the inverse of the second moments."""
    if moments is None:
        return np.ones(size, np.float32), np.eye(size, dtype=np.float32)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(size)] += DAMPING * np.trace(damped) / size + np.finfo(np.float32).tiny
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    return np.diag(damped).astype(np.float32), upper.astype(np.float32)


def _round_block(
    left: np.ndarray, scale: np.ndarray, zero: np.ndarray, inverse: np.ndarray, rounded: Rounded, block: slice
) -> np.ndarray:
    """Write the codes of a block of inputs `left` (block, out), changed on the way; returns what each lost, scaled."""
    errors = np.empty_like(left)
    for row, weights in enumerate(left):
        codes = _codes(weights, scale, zero)
        rounded.codes[block.start + row] = codes
        errors[row] = (weights - (codes - zero) * scale) / inverse[row, row]
        left[row + 1 :] -= inverse[row, row + 1 :, None] * errors[row]
    return errors


def _grid(block: np.ndarray, power: np.ndarray, dtype: np.dtype, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (out,) for a block of inputs (block, out), the best of SHARES for each output."""
    below, above = -np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
    step = np.maximum(below, above) / (LEVELS // 2 - 1) if symmetric else (below + above) / (LEVELS - 1)
    scales, zeros, lost = [], [], []
    for share in SHARES:
        scale = np.maximum(share * step, np.finfo(dtype).smallest_normal).astype(dtype)  # a block of zeros has one too
        wide = scale.astype(np.float32)
        zero = np.full(scale.shape, LEVELS // 2) if symmetric else np.rint(share * below / wide)
        zero = zero.clip(0, LEVELS - 1).astype(np.uint8)
        scales.append(scale)
        zeros.append(zero)
        lost.append((power * np.square((_codes(block, wide, zero) - zero) * wide - block)).sum(axis=0))
    best = np.argmin(lost, axis=0)[None]
    return np.take_along_axis(np.stack(scales), best, 0)[0], np.take_along_axis(np.stack(zeros), best, 0)[0]


def _codes(weights: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The nearest numbers 0 to 15, as floats: their differences are wanted next."""
    codes: np.ndarray = (np.rint(weights / scale) + zero).clip(0, LEVELS - 1)
    return codes
