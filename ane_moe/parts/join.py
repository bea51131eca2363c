"""What follows the parts of a layer whose sum is normed before it meets the stream."""

from torch import Tensor

from ane_moe.model.join import JoinConfig
from ane_moe.parts.block import Block
from ane_moe.parts.residual import NormedResidual


class Join(Block):
    """`y = x + norm(added)`."""

    config: JoinConfig

    def __init__(self, config: JoinConfig):
        super().__init__()
        self.config = config
        self.residual = NormedResidual(config.d_model, config.norm)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"y": self.residual(inputs["x"], inputs["added"])}
