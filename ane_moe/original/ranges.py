"""How large hidden states get, and the sums that are added to them, beside what fp16 and the Neural
Engine's accumulator hold; and what they had to be divided by to stay within."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ane_moe.model.spec import InnerScale
from ane_moe.original.golden import Golden, LayerGolden

STREAM_LIMIT = 65504.0  # the largest fp16
SUM_LIMIT = 32752.0  # the largest fp16 below the accumulator's limit
# Another text may reach twice as far as the one that was looked at.
HEADROOM = 2.0


@dataclass(frozen=True)
class LayerRange:
    """Largest magnitudes in one layer: of the hidden state before, between and after its blocks, or
    what experts give where that is not added to it as it is; and of a partial sum, its terms in the
    worst order, of what is added to it (0: not known). So are `values` of an attention and `ups`,
    the linear branch of gated MLPs; `hidden` is of their products."""

    layer: int
    stream: float
    sums: float
    values: float = 0.0
    ups: float = 0.0
    hidden: float = 0.0

    @property
    def share(self) -> float:
        """Of what there is room for: above 1 something overflows."""
        return max(self.stream / STREAM_LIMIT, self.sums / SUM_LIMIT)

    @property
    def values_share(self) -> float:
        return self.values / SUM_LIMIT

    @property
    def ups_share(self) -> float:
        return max(self.ups / SUM_LIMIT, self.hidden / STREAM_LIMIT)

    @property
    def inner_share(self) -> float:
        """The same inside the layer."""
        return max(self.values_share, self.ups_share)

    def scaled(self, inner: InnerScale) -> "LayerRange":
        """With values and linear branches times `inner`."""
        values, ups = self.values * inner.values, self.ups * inner.ups
        return replace(self, values=values, ups=ups, hidden=self.hidden * inner.ups)


def range_of(layer: int, golden: LayerGolden) -> LayerRange:
    states = (golden.x, golden.middle, golden.y, golden.entering, golden.experts_delta)
    stream = max(float(np.abs(state).max()) for state in states if state is not None)
    sums = 0.0 if golden.sums is None else float(golden.sums.max())
    inner = (0.0,) * 3 if golden.inner is None else golden.inner.max(0).tolist()
    return LayerRange(layer, stream, sums, *inner)


def ranges_of(golden: Golden) -> tuple[LayerRange, ...]:
    return tuple(range_of(layer, golden.layers[layer]) for layer in golden.layers)


def needed_divisor(ranges: Iterable[LayerRange], scale: float = 1.0) -> int:
    """The least power of two by which hidden states have to be divided, to leave HEADROOM; those of
    `ranges` are times `scale`. 1 where they are infinite: nothing helps."""
    return power_for(max((one.share for one in ranges), default=0.0) / scale)


def needed_inner(ranges: Iterable[LayerRange]) -> dict[int, InnerScale]:
    """The largest powers of two, 1 at most, that leave HEADROOM inside the layers that need it."""
    shares: dict[int, tuple[float, float]] = {}
    for one in ranges:
        values, ups = shares.get(one.layer, (0.0, 0.0))
        shares[one.layer] = max(values, one.values_share), max(ups, one.ups_share)
    scales = {layer: InnerScale(*(1 / power_for(one) for one in shares[layer])) for layer in shares}
    return {layer: scale for layer, scale in sorted(scales.items()) if scale != InnerScale()}


def power_for(share: float) -> int:
    """The least power of two that a share has to be divided by to leave HEADROOM."""
    wanted = HEADROOM * share
    return 1 << math.ceil(math.log2(wanted)) if 1 < wanted < math.inf else 1
