"""Scores of a later layer's experts, early: that layer's router, and an adapter before it."""

from torch import Tensor

from ane_moe.parts.norm import UnitNorm
from ane_moe.parts.projection import Projection


class EarlyRouter(Projection):
    """`(1, d, 1, T) -> (1, E, 1, T)`. Both are linear in the stream but for its scale, so that one
    matrix is enough (`Adapter.before`). Where the layer's own norm reads the same stream, the two
    have their operations in common."""

    def __init__(self, d_model: int, experts: int, eps: float):
        super().__init__(d_model, experts)
        self.level = UnitNorm(eps)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(self.level(x), scale)


def make_early(d_model: int, experts: int, eps: float) -> EarlyRouter | None:
    """Nothing where no experts are guessed."""
    return EarlyRouter(d_model, experts, eps) if experts else None
