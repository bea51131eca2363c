"""Distances between what a shard adds to its input and what the original model adds.

A shard returns y = fp16(x + delta), so `y - x` carries the rounding of y: half a unit in the last
place of |x|, whatever the size of delta. Inputs are therefore the golden's rounded to fp16 (exact
in the shard), differences are taken in fp32, and the same rounding applied to the golden's own
delta gives the score a perfect shard would get. Only the loss beyond that counts against the gate:
measured and attainable cosine lose the same amount to rounding on average, as the rounding is
independent of the shard's own error. All arrays are `[N,C]`: N tokens of C channels.
"""

import math
from dataclasses import dataclass

import numpy as np

TINY = 1e-30  # keeps the relative error of an all-zero golden finite


@dataclass(frozen=True)
class Distance:
    cosine: float
    attainable_cosine: float
    worst_token_cosine: float
    relative_l2: float
    attainable_relative_l2: float
    max_abs_error: float

    def margin(self, min_cosine: float) -> float:
        """How far the cosine lies above `min_cosine`, the loss that rounding alone costs given
        back."""
        return self.cosine + (1 - self.attainable_cosine) - min_cosine

    def relative_l2_margin(self, max_relative_l2: float) -> float:
        """How far the relative L2 error lies below its limit, rounding's own share (as energy)
        taken out."""
        beyond = self.relative_l2**2 - self.attainable_relative_l2**2
        return max_relative_l2 - max(0.0, beyond) ** 0.5


def relative_l2_limit(min_cosine: float) -> float:
    """The relative L2 error of a delta of the right length along the golden whose cosine is just
    `min_cosine`.

    The cosine is blind to a wrong factor (a residual multiplier, say); the same gate on the error
    is not.
    """
    return math.sqrt(1 / min_cosine**2 - 1) if min_cosine > 0 else math.inf


def delta_distance(base: np.ndarray, y: np.ndarray, delta: np.ndarray) -> Distance:
    """Compare `y - base` with the golden's `delta`; `base` is the fp16 input for shards with the
    residual inside.

    Pass zeros as `base` for outputs without a residual (logits, embedding rows).
    """
    base32 = base.astype(np.float32)
    measured = y.astype(np.float32) - base32
    with np.errstate(over="ignore"):
        perfect = (base32 + delta).astype(np.float16).astype(np.float32) - base32
    error = measured - delta
    return Distance(
        cosine=cosine(measured, delta),
        attainable_cosine=cosine(perfect, delta),
        worst_token_cosine=float(token_cosines(measured, delta).min()),
        relative_l2=_norm(error) / max(_norm(delta), TINY),
        attainable_relative_l2=_norm(perfect - delta) / max(_norm(delta), TINY),
        max_abs_error=float(np.abs(error).max()),
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine over all elements, in fp64; two zero arrays agree."""
    a64, b64 = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    size = np.linalg.norm(a64) * np.linalg.norm(b64)
    return float(a64 @ b64 / size) if size else float(not a64.any() and not b64.any())


def token_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row, fp64 `[N]`; two zero rows agree, and NaN stays NaN."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    sizes = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    alike = ~a64.any(1) & ~b64.any(1)
    return np.where(sizes == 0, alike, (a64 * b64).sum(1) / np.where(sizes == 0, 1, sizes))


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))
