"""How large hidden states get, and the sums that are added to them, beside what fp16 and the Neural
Engine's accumulator hold; and what they had to be divided by to stay within."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ane_moe.original.golden import Golden, LayerGolden

STREAM_LIMIT = 65504.0  # the largest fp16
SUM_LIMIT = 32752.0  # the largest fp16 below the accumulator's limit
# Another text may reach twice as far as the one that was looked at.
HEADROOM = 2.0


@dataclass(frozen=True)
class LayerRange:
    """Largest magnitudes in one layer: of the hidden state before, between and after its blocks;
    and of a partial sum, its terms in the worst order, of what is added to it (0: not known)."""

    layer: int
    stream: float
    sums: float

    @property
    def share(self) -> float:
        """Of what there is room for: above 1 something overflows."""
        return max(self.stream / STREAM_LIMIT, self.sums / SUM_LIMIT)


def range_of(layer: int, golden: LayerGolden) -> LayerRange:
    states = (golden.x, golden.middle, golden.y, golden.entering)
    stream = max(float(np.abs(state).max()) for state in states if state is not None)
    sums = 0.0 if golden.sums is None else float(golden.sums.max())
    return LayerRange(layer, stream, sums)


def ranges_of(golden: Golden) -> tuple[LayerRange, ...]:
    return tuple(range_of(layer, golden.layers[layer]) for layer in golden.layers)


def needed_divisor(ranges: Iterable[LayerRange], scale: float = 1.0) -> int:
    """The least power of two by which hidden states have to be divided, to leave HEADROOM; those of
    `ranges` are times `scale`. 1 where they are infinite: nothing helps."""
    share = HEADROOM / scale * max((one.share for one in ranges), default=0.0)
    return 1 << math.ceil(math.log2(share)) if 1 < share < math.inf else 1
