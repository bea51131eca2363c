"""Kimi delta attention (Kimi Linear, Ling 3): the facts of the mixer, without torch.

Source: arXiv 2510.26692, and transformers' `KimiLinearDeltaAttention` and
`BailingHybridDeltaAttention`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class KdaSpec(DeltaNetSpec):
    """A delta net whose matrices decay by key channel: `S = S diag(exp(g))`, with as many key heads
    as value heads, and a convolution for each of queries, keys and values.

    `g = -exp(rate) softplus(decay(x))`, `rate` by head; with a `floor` it is `-floor
    sigmoid(exp(rate) decay(x))`. What is given is normed by head, and multiplied by
    `sigmoid(z(x))`. Where there is a `rank`, `decay` and `z` read so many channels that a matrix
    makes of x.
    """

    rank: int | None = None
    floor: float | None = None

    def gate_rows(self, d_model: int) -> Iterator[Weight]:
        inner, reads = self.rank or d_model, "z_latent" if self.rank else "x"
        if self.rank:
            yield Weight("z_down.weight", (self.rank, d_model), "attention.gate", reads="x")
            yield Weight("decay_down.weight", (self.rank, d_model))
        yield Weight("z.weight", (self.values, inner), "attention.gate", reads=reads)
        yield Weight("beta.weight", (self.value_heads, d_model))
        yield Weight("decay.weight", (self.keys, inner))
        yield Weight("decay.bias", (self.keys,))
        yield Weight("decay.rate", (self.key_heads,))
        for name, width in (("query", self.queries), ("key", self.keys), ("value", self.values)):
            yield Weight(f"{name}_conv.weight", (width, 1, self.taps))


@dataclass(frozen=True)
class KdaConfig(DeltaNetConfig):
    mixer: KdaSpec
