"""Compressed convolutional attention (ZAYA1): the facts of the mixer, without torch.

Source: arXiv 2510.04476, and transformers' `ZayaCCAProjection` and `ZayaQKNorm`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.kv_cache import cache_ports, cache_states
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.recent import recent_port, shift_port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class CcaSpec:
    """Grouped-query attention whose queries and keys pass two causal convolutions over tokens: one
    by channel, of `taps[0]` tokens, then one by head, of `taps[1]`. The means of queries and keys
    go past them; both are scaled to the length sqrt(head_dim), keys times a temperature by head.
    The first half of the value channels is of the token itself, the second half of the one before
    it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: str | None
    taps: tuple[int, int] = (2, 2)
    window: int | None = None  # tokens a query sees, itself included; None: all before it

    @property
    def channels(self) -> int:
        """Of queries and keys together."""
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def history(self) -> int:
        """Tokens before a call that its convolutions see."""
        return sum(self.taps) - 2

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = {"q": query, "k": key, "v_current": key // 2, "v_delayed": key // 2}
        first, second = self.taps
        for name, width in widths.items():
            yield Weight(f"{name}.weight", (width, d_model), f"attention.{name[0]}", reads="x")
        yield Weight(
            "o.weight", (d_model, query), "attention.o", reads="attended", fold="residual_scale"
        )
        yield Weight("by_channel.weight", (self.channels, 1, first))
        yield Weight("by_channel.bias", (self.channels,))
        yield Weight("by_head.weight", (self.channels, self.head_dim, second))
        yield Weight("by_head.bias", (self.channels,))
        yield Weight("temperature.weight", (self.kv_heads,))


@dataclass(frozen=True)
class CcaConfig(MixerConfig):
    mixer: CcaSpec

    @property
    def delayed(self) -> int:
        """Value channels that are of the token before."""
        return self.mixer.kv_heads * self.mixer.head_dim // 2

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        return (
            *cache_states(m.kv_heads, m.head_dim, self.slots),
            recent_port("qk_recent", m.channels),
            recent_port("v_recent", self.delayed),
        )

    def host(self, tokens: int) -> tuple[Port, ...]:
        m = self.mixer
        caches = cache_ports(m.rope, self.rotary, m.window, self.slots, tokens)
        return (
            *caches,
            shift_port("qk_shift", m.history, tokens),
            shift_port("v_shift", 1, tokens),
        )
