"""Numbers divided by a power of two, where they would overflow: how far, and what that costs.

Hidden states are, everywhere; and layer by layer the values of attention and the linear branch of
gated MLPs, with which their products with the gate shrink. The division goes into the weights of
whatever writes them, and for what is inside a layer out of those that read them. A power of two
changes no digit of a weight, but for those that become subnormal numbers of fp16.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.conversion.job import Job, plan_of
from ane_moe.errors import UserError
from ane_moe.formats.calibration import Moments
from ane_moe.model.spec import UPS, VALUES, InnerScale, ModelSpec
from ane_moe.model.weight import EMBEDDING
from ane_moe.opened import with_scales
from ane_moe.original.golden import read_golden
from ane_moe.original.ranges import LayerRange, needed_divisor, needed_inner, ranges_of

PIECE_ELEMENTS = 1 << 23  # read twice at once


@dataclass(frozen=True)
class Scales:
    """What hidden states are divided by, and what layers inside are multiplied by."""

    divisor: int = 1
    inner: Mapping[int, InnerScale] = field(default_factory=dict)


@dataclass(frozen=True)
class DividedStream:
    """What hidden states were divided by, what `inner` numbers of layers were multiplied by, and
    what was known of them before: `ranges` by layer. Of the `weights` that this made smaller,
    `rounded` lost digits."""

    divisor: int
    ranges: tuple[LayerRange, ...]
    inner: Mapping[int, InnerScale] = field(default_factory=dict)
    weights: int = 0
    rounded: int = 0

    @property
    def widest(self) -> LayerRange | None:
        """The layer that comes nearest to a limit."""
        return max(self.ranges, key=lambda one: one.share, default=None)


def known_ranges(job: Job, golden: Path) -> tuple[LayerRange, ...]:
    """What the calibration and the golden say of hidden states, where they are there."""
    ranges: list[LayerRange] = []
    if job.calibration:
        met = Moments(job.calibration).ranges().items()
        ranges += (LayerRange(layer, *largest) for layer, largest in met)
    with suppress(UserError):  # one that is damaged: whoever keeps goldens looks at it
        ranges += ranges_of(read_golden(golden)) if golden.exists() else ()
    return tuple(ranges)


def wanted_scales(job: Job, golden: Path) -> Scales:
    """Hidden states as the options say, or as there is need; layers inside as there is need, unless
    the options rule it out.

    Raises UserError where a number is asked for, and layers read hidden states without a norm.
    """
    asked, may = job.plan.options.stream_divisor, job.spec.may_scale_stream
    if asked == 1:
        return Scales()
    if asked and not may:
        raise UserError(
            f"{job.spec.family} reads hidden states without a norm",
            f"--stream-scale {asked}",
            "leave the option out",
        )
    ranges = known_ranges(job, golden)
    mendable = [_mendable(one, job.spec) for one in ranges if one.layer in job.plan.layers]
    divisor = (asked or needed_divisor(ranges)) if may else 1
    return Scales(divisor, needed_inner(mendable))


def _mendable(found: LayerRange, spec: ModelSpec) -> LayerRange:
    """Without what the layer has no multiplier for: what an activation clamps."""
    rows = spec.layers[found.layer].weights(found.layer, spec.d_model, spec.norm)
    folds = {row.fold for _, row in rows}
    values = found.values if VALUES in folds else 0.0
    ups, hidden = (found.ups, found.hidden) if UPS in folds else (0.0, 0.0)
    return replace(found, values=values, ups=ups, hidden=hidden)


def scaled(job: Job, scales: Scales) -> Job:
    """The job with its hidden states and its layers so scaled."""
    if (job.spec.stream_scale, job.spec.inner) == (1 / scales.divisor, scales.inner):
        return job
    moved = with_scales(job, 1 / scales.divisor, scales.inner)
    return replace(moved, plan=plan_of(moved, job.plan.options))


def divided_stream(job: Job, golden: Path) -> DividedStream:
    """What the job does to hidden states and inside layers, and what that costs its weights."""
    divisor, ranges = round(1 / job.spec.stream_scale), known_ranges(job, golden)
    counts = [
        (piece.region[1], _rounded(job.checkpoint, piece, before))
        for source, before in _moved(job)
        for piece in _pieces(source)
    ]
    weights, rounded = (sum(column) for column in zip((0, 0), *counts, strict=True))
    return DividedStream(divisor, ranges, job.spec.inner, weights, rounded)


def _moved(job: Job) -> Iterator[tuple[TensorSource, float]]:
    """The tensors of the conversion that this makes smaller, and their multiplier without it."""
    alone = with_scales(job, 1.0, {}).sources
    for name, source in job.sources.items():
        converted = name == EMBEDDING or name.layer in job.plan.layers
        if converted and abs(source.scale) < abs(alone[name].scale):
            yield source, alone[name].scale


def _pieces(source: TensorSource) -> Iterator[TensorSource]:
    """Runs of rows that are not too large, where rows can be read one by one."""
    rows, count = source.shape[0], source.region[1]
    step = max(1, rows * PIECE_ELEMENTS // count)
    if step >= rows or not source.in_place:
        yield source
        return
    yield from (source.part(first, min(first + step, rows)) for first in range(0, rows, step))


def _rounded(checkpoint: Checkpoint, source: TensorSource, before: float) -> int:
    """Weights that lose digits by another multiplier than `before`."""
    stored = checkpoint.read(source).astype(np.float32)
    wanted = checkpoint.read(replace(source, scale=before)).astype(np.float32)
    return int(np.count_nonzero(stored * np.float32(before / source.scale) != wanted))
