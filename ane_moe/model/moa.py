"""Attention whose queries and output are experts' (JetMoE): the facts of the mixer, without torch.

Source: arXiv 2404.07413, and transformers' `JetMoeMoA` and `JetMoeAttention`. Every expert attends
here, and what those that are not chosen give is weighed by zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.kv_cache import cache_ports, cache_states
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.spec import RouterSpec
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class MoaSpec:
    """`experts` matrices that give queries for the `heads` whose keys and values all of them see,
    and as many that take in what is attended to. A router chooses `k` for each token and weighs
    them, by a softmax over the chosen."""

    heads: int
    head_dim: int
    experts: int
    k: int
    scale: float
    rope: str | None
    window: None = None

    @property
    def router(self) -> RouterSpec:
        return RouterSpec(self.experts, self.k)

    @property
    def width(self) -> int:
        """Channels of keys, of values, and of each expert's queries."""
        return self.heads * self.head_dim

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention."""
        every = self.experts * self.width
        yield from (row.under("router") for row in self.router.rows(d_model))
        for name, width in (("q", every), ("k", self.width), ("v", self.width)):
            yield Weight(f"{name}.weight", (width, d_model), f"attention.{name}", reads="x")
        # No module of transformers is given all that enters it.
        yield Weight("o.weight", (d_model, every), "attention.o", fold="residual_scale")
        yield Weight("o.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class MoaConfig(MixerConfig):
    mixer: MoaSpec

    @property
    def states(self) -> tuple[Port, ...]:
        return cache_states(self.mixer.heads, self.mixer.head_dim, self.slots)

    def host(self, tokens: int) -> tuple[Port, ...]:
        return cache_ports(self.mixer.rope, self.rotary, None, self.slots, tokens)
