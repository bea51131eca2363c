"""Hidden states divided by a power of two, where they would overflow: how far, and what that costs.

The division goes into the weights of whatever writes to the stream. A power of two changes no digit
of a weight, but for those that become subnormal numbers of fp16.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.conversion.job import Job, plan_of
from ane_moe.errors import UserError
from ane_moe.formats.calibration import Moments
from ane_moe.model.weight import EMBEDDING
from ane_moe.opened import with_stream
from ane_moe.original.golden import read_golden
from ane_moe.original.ranges import LayerRange, needed_divisor, ranges_of

PIECE_ELEMENTS = 1 << 23  # read twice at once


@dataclass(frozen=True)
class DividedStream:
    """What hidden states were divided by, and what was known of them before: `ranges` by layer. Of
    the `weights` that the division went into, `rounded` lost digits."""

    divisor: int
    ranges: tuple[LayerRange, ...]
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


def wanted_divisor(job: Job, golden: Path) -> int:
    """What hidden states are to be divided by: as the options say, or as there is need.

    Raises UserError where a number is asked for, and layers read hidden states without a norm.
    """
    asked = job.plan.options.stream_divisor
    if job.spec.may_scale_stream:
        return needed_divisor(known_ranges(job, golden)) if asked is None else asked
    if asked not in (None, 1):
        raise UserError(
            f"{job.spec.family} reads hidden states without a norm",
            f"--stream-scale {asked}",
            "leave the option out",
        )
    return 1


def divided(job: Job, divisor: int) -> Job:
    """The job with its hidden states divided by `divisor`."""
    if job.spec.stream_scale == 1 / divisor:
        return job
    moved = with_stream(job, 1 / divisor)
    return replace(moved, plan=plan_of(moved, job.plan.options))


def divided_stream(job: Job, golden: Path) -> DividedStream:
    """What the job does to hidden states, and what that costs its weights."""
    divisor, ranges = round(1 / job.spec.stream_scale), known_ranges(job, golden)
    if divisor == 1:
        return DividedStream(1, ranges)
    counts = [
        (piece.region[1], _rounded(job.checkpoint, piece, divisor))
        for source in _written_to_the_stream(job)
        for piece in _pieces(source)
    ]
    weights, rounded = (sum(column) for column in zip(*counts, strict=True))
    return DividedStream(divisor, ranges, weights, rounded)


def _written_to_the_stream(job: Job) -> Iterator[TensorSource]:
    """The tensors of the conversion that the division goes into."""
    spec = job.spec
    alone = spec.with_stream(1.0)
    for name, source in job.sources.items():
        converted = name == EMBEDDING or name.layer in job.plan.layers
        if converted and spec.multiplier(source.fold) != alone.multiplier(source.fold):
            yield source


def _pieces(source: TensorSource) -> Iterator[TensorSource]:
    """Runs of rows that are not too large, where rows can be read one by one."""
    rows, count = source.shape[0], source.region[1]
    step = max(1, rows * PIECE_ELEMENTS // count)
    if step >= rows or not source.in_place:
        yield source
        return
    yield from (source.part(first, min(first + step, rows)) for first in range(0, rows, step))


def _rounded(checkpoint: Checkpoint, source: TensorSource, divisor: int) -> int:
    """Weights that the division changes by more than their exponent."""
    stored = checkpoint.read(source).astype(np.float32)
    before = checkpoint.read(replace(source, scale=source.scale * divisor)).astype(np.float32)
    return int(np.count_nonzero(stored * np.float32(divisor) != before))
