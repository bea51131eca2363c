"""Scores of a later layer's experts, early: that layer's router, and an adapter before it."""

from torch import Tensor

from ane_moe.model.routed import EarlyConfig
from ane_moe.parts.norm import UnitNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector
from ane_moe.parts.router import SCORES, capped


class EarlyRouter(Projection):
    """`(1, d, 1, T) -> (1, E, 1, T)`. Both are linear in the stream but for its scale, so that one
    matrix is enough (`Adapter.before`). Where the layer's own norm reads the same stream, the two
    have their operations in common. Groups are left to the host, which loads."""

    def __init__(self, d_model: int, eps: float, config: EarlyConfig):
        super().__init__(d_model, config.experts)
        self.ranking = config.ranking
        self.level = UnitNorm(eps, centred=self.ranking.centred)
        self.choice_bias = vector(config.experts) if self.ranking.bias else None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        logits = capped(super().forward(self.level(x), scale), self.ranking.softcap)
        scores = SCORES[self.ranking.score](logits)
        return scores if self.choice_bias is None else scores + self.choice_bias


def make_early(d_model: int, eps: float, config: EarlyConfig | None) -> EarlyRouter | None:
    """Nothing where no experts are guessed."""
    return None if config is None else EarlyRouter(d_model, eps, config)
