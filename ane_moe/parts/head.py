"""The language-model head: final norm and one slice of the vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.spec import HeadSpec, NormSpec
from ane_moe.model.weight import Row, with_directions
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection


@dataclass(frozen=True)
class HeadConfig:
    d_model: int
    norm: NormSpec
    vocab_rows: int
    rank: int = 0

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        whole = HeadSpec(tied=False).rows(self.vocab_rows, self.d_model)
        return with_directions(whole, {"rows": self.rank})

    def ports(self, tokens: int) -> Ports:
        logits = Port("logits", (1, self.vocab_rows, 1, tokens), "logits[{rows}]")
        return Ports((Port("x", (1, self.d_model, 1, tokens), STREAM),), (logits,))


class Head(Block):
    """`(1, d, 1, T) -> (1, rows, 1, T)` logits."""

    config: HeadConfig

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        self.norm = RmsNorm(config.d_model, config.norm.eps)
        self.rows = Projection(config.d_model, config.vocab_rows, rank=config.rank)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.rows(self.norm(inputs["x"]))}
