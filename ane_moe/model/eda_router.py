"""The router of ZAYA1, without torch: a small network over a state that is averaged over depth.

Source: transformers' `ZayaRouter`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.ranking import Ranking
from ane_moe.model.weight import Weight


@dataclass(frozen=True)
class EdaRouterSpec:
    """The normed stream is brought down to `width` channels; what the layer before had there is
    added, times a scale by channel (`takes`: not in the first layer), and handed on. A network with
    GELUs scores `experts` and one class that computes nothing. Of scores plus biases the largest is
    chosen; its weight is the score alone.
    """

    experts: int
    width: int
    takes: bool
    eps: float
    k: int = 1

    @property
    def classes(self) -> int:
        """Rows of the gates: the experts, and the class that skips them."""
        return self.experts + 1

    @property
    def carry(self) -> int:
        """Channels handed on to the next layer."""
        return self.width

    @property
    def ranking(self) -> Ranking | None:
        """None: no matrix alone tells the highest."""
        return None

    def rows(self, d_model: int) -> Iterator[Weight]:
        width = self.width
        yield Weight("choice_bias", (self.classes,), centred=True)
        if self.takes:
            yield Weight("carry_scale", (width,))
        yield Weight("down.weight", (width, d_model))
        yield Weight("down.bias", (width,))
        yield Weight("norm.weight", (width,))
        for layer in ("fc1", "fc2"):
            yield Weight(f"{layer}.weight", (width, width))
            yield Weight(f"{layer}.bias", (width,))
        yield Weight("out.weight", (self.classes, width))
