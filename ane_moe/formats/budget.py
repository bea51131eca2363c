"""Formats chosen matrix by matrix, by what each costs in bytes and in error.

The error of a matrix in a format is that of its outputs on the calibration text: the relative
squared error under the inputs' mean squares, measured on a sample of its rows, times the share of
the last hidden state's energy that comes through it (`Moments.share`). That inputs are
uncorrelated, and that later layers neither damp nor amplify, is assumed; what the whole model loses
is measured by `verify`, not here. An expert that calibration never met costs nothing and takes the
fewest bytes.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.errors import UserError
from ane_moe.formats.calibration import Moments
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format
from ane_moe.model.weight import WeightName
from ane_moe.remote_folder import SentFile, at_hand

CANDIDATES = ("fp16", "int8", "lut6", "lut4", "lut3", "lut2")
SAMPLED_ROWS = 64  # four palettes of 16 rows


@dataclass(frozen=True)
class Option:
    """One format for a matrix: its bytes, the error it adds, and the cosine of the outputs."""

    format: str
    stored_bytes: int
    error: float
    cosine: float


@dataclass(frozen=True)
class Sensitivity:
    """The options of one of our tensors."""

    tensor: WeightName
    options: tuple[Option, ...]


def measure_sensitivity(
    checkpoint: Checkpoint, calibration: Path | SentFile, sources: Sequence[TensorSource]
) -> list[Sensitivity]:
    """Encode a sample of each matrix in every candidate format and compare outputs."""
    with at_hand(calibration) as path:
        moments = Moments(path)
        return [_measured(checkpoint.read(_sample(source)), source, moments) for source in sources]


def _sample(source: TensorSource) -> TensorSource:
    """The middle rows, whole palettes of them."""
    rows = source.shape[0]
    if rows <= SAMPLED_ROWS or not source.in_place:
        return source
    first = (rows - SAMPLED_ROWS) // 2 // 16 * 16
    return source.part(first, first + SAMPLED_ROWS)


def _measured(weight: np.ndarray, source: TensorSource, moments: Moments) -> Sensitivity:
    met = moments.find(source.reads, source.shape[1])
    m = np.ones(source.shape[1], np.float32) if met is None else met
    share = 0.0 if met is None else moments.share(source.name)
    options = []
    for name in CANDIDATES:
        encoded = find_format(name).encode(weight, met)
        stored = weight if encoded is None else expand(encoded)
        error, cosine = _output_error(weight.astype(np.float32), stored.astype(np.float32), m)
        options.append(
            Option(name, find_format(name).stored_bytes(*source.shape), share * error, cosine)
        )
    return Sensitivity(source.name, tuple(options))


def _output_error(
    weight: np.ndarray, stored: np.ndarray, moments: np.ndarray
) -> tuple[float, float]:
    """Relative squared error and cosine of the outputs for uncorrelated inputs of these mean
    squares."""
    energy = float((weight**2 @ moments).sum(dtype=np.float64))
    if not energy:
        return 0.0, 1.0
    own = float((stored**2 @ moments).sum(dtype=np.float64))
    product = float(((weight * stored) @ moments).sum(dtype=np.float64))
    error = float(((weight - stored) ** 2 @ moments).sum(dtype=np.float64)) / energy
    return error, product / math.sqrt(energy * own) if own else 0.0


def fit_budget(sensitivities: Sequence[Sensitivity], budget_bytes: int) -> dict[WeightName, str]:
    """Formats by tensor of the least summed error within `budget_bytes` for all of them together.

    Each matrix keeps to the lower convex hull of its options, and steps are taken in the order of
    error per byte saved:
    the Lagrangian optimum up to one step (Shoham and Gersho, 1988). Raises UserError when even the
    smallest formats take more.
    """
    hulls = {entry.tensor: _hull(entry.options) for entry in sensitivities}
    place = dict.fromkeys(hulls, 0)
    total = sum(hull[0].stored_bytes for hull in hulls.values())
    heap = [(_slope(hull, 0), tensor) for tensor, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(heap)
    while total > budget_bytes and heap:
        _, tensor = heapq.heappop(heap)
        hull, at = hulls[tensor], place[tensor]
        total -= hull[at].stored_bytes - hull[at + 1].stored_bytes
        place[tensor] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(heap, (_slope(hull, at + 1), tensor))
    if total > budget_bytes:
        raise UserError(
            "--budget-mb is too small for this model",
            f"its matrices take at least {total / 1e6:.1f} MB, "
            f"{budget_bytes / 1e6:.1f} MB are left for them",
            "give more",
        )
    return {tensor: hull[place[tensor]].format for tensor, hull in hulls.items()}


def reach_cosine(sensitivities: Sequence[Sensitivity], least: float) -> dict[WeightName, str]:
    """For each tensor the smallest format whose outputs keep a cosine of `least`."""
    formats: dict[WeightName, str] = {}
    for entry in sensitivities:
        kept = [option for option in entry.options if option.cosine >= least] or entry.options[:1]
        formats[entry.tensor] = min(kept, key=lambda option: option.stored_bytes).format
    return formats


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over bytes, the largest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (-option.stored_bytes, option.error)):
        if hull and option.stored_bytes == hull[-1].stored_bytes:
            continue
        while hull and option.error <= hull[-1].error:
            hull.pop()
        while len(hull) > 1 and _between(hull[-2], hull[-1]) >= _between(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _between(large: Option, small: Option) -> float:
    return (small.error - large.error) / (large.stored_bytes - small.stored_bytes)


def _slope(hull: Sequence[Option], at: int) -> float:
    return _between(hull[at], hull[at + 1])
