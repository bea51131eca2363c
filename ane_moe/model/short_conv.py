"""Gated short convolution (LFM2): the facts of the mixer, without torch.

Source: transformers' `Lfm2ShortConv`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.recent import recent_port, shift_port
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class ShortConvSpec:
    """`out(c * conv(b * u))` with b, c, u = in(x), all `d_model` channels wide; the convolution is
    causal, by channel, over `taps` tokens."""

    taps: int
    bias: bool = False
    rope: None = None
    window: None = None

    @property
    def history(self) -> int:
        """Tokens before a call that its convolution sees."""
        return self.taps - 1

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's convolution."""
        for name in "bcu":
            yield Weight(f"{name}.weight", (d_model, d_model), "attention.q", reads="x")
            if self.bias:
                yield Weight(f"{name}.bias", (d_model,))
        yield Weight("conv.weight", (d_model, 1, self.taps))
        if self.bias:
            yield Weight("conv.bias", (d_model,))
        yield Weight(
            "o.weight", (d_model, d_model), "attention.o", reads="attended", fold="residual_scale"
        )
        if self.bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class ShortConvConfig(MixerConfig):
    mixer: ShortConvSpec

    @property
    def states(self) -> tuple[Port, ...]:
        return (recent_port("recent", self.d_model),)

    def host(self, tokens: int) -> tuple[Port, ...]:
        return (shift_port("shift", self.mixer.history, tokens),)
