"""The language-model head: final norm and one slice of the vocabulary."""

import torch
from torch import Tensor

from ane_moe.model.head import HeadConfig
from ane_moe.parts.block import Block
from ane_moe.parts.norm import make_norm
from ane_moe.parts.projection import Projection


class Head(Block):
    """`(1, d, 1, T) -> (1, rows, 1, T)` logits."""

    config: HeadConfig

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.norm = make_norm(config.d_model, config.norm)
        self.rows = Projection(config.d_model, config.scores, config.bias, config.rank)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        logits, cap = self.rows(self.norm(inputs["x"])), self.config.softcap
        return {"logits": logits if cap is None else torch.tanh(logits / cap) * cap}
