"""Gated short convolution in the place of attention."""

from torch import Tensor

from ane_moe.model.short_conv import ShortConvConfig
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.projection import Projection
from ane_moe.parts.recent import advanced, joined
from ane_moe.parts.token_convolution import TokenConvolution


class ShortConv(Mixer):
    """`y = x + out(c * conv(b * u))` with b, c and u of the normed stream."""

    config: ShortConvConfig

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.b = Projection(d, d, m.bias, c.rank("b"))
        self.c = Projection(d, d, m.bias, c.rank("c"))
        self.u = Projection(d, d, m.bias, c.rank("u"))
        self.conv = TokenConvolution(d, 1, m.taps, m.bias)
        self.o = Projection(d, d, m.bias, c.rank("o"))

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen = joined("recent", self.b(h) * self.u(h), self.config.mixer.history, inputs)
        added = self.o(self.c(h) * self.conv(seen))
        return added, {"recent": advanced("recent", seen, "shift", inputs, self.config.explicit)}
