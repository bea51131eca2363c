"""What follows the parts of a layer whose sum is normed before it meets the stream."""

from torch import Tensor

from ane_moe.model.join import JoinConfig
from ane_moe.parts.beside import Beside
from ane_moe.parts.block import Block
from ane_moe.parts.residual import make_residual


class Join(Block):
    """`y = x + norm(added)`, where a dense MLP stands beside what experts added."""

    config: JoinConfig

    def __init__(self, config: JoinConfig):
        super().__init__()
        self.config = config
        d, norm = config.d_model, config.norm
        if config.beside is not None:
            self.beside = Beside(d, norm, config.beside, config.ranks)
        self.residual = make_residual(d, norm, config.residual)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, added = inputs["x"], inputs["added"]
        if self.config.beside is not None:
            added = self.beside(x, added)
        return {"y": self.residual(x, added)}
