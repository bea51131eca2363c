"""The head of a language model or a token classifier as data."""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.spec import HeadSpec, NormSpec
from ane_moe.model.weight import Row, with_directions


@dataclass(frozen=True)
class HeadConfig:
    d_model: int
    norm: NormSpec
    scores: int
    rank: int = 0
    bias: bool = False
    softcap: float | None = None

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        whole = HeadSpec(tied=False, bias=self.bias).rows(self.scores, self.d_model, self.norm)
        return with_directions(whole, {"rows": self.rank})

    def ports(self, tokens: int) -> Ports:
        logits = Port("logits", (1, self.scores, 1, tokens), "logits[{rows}]")
        return Ports((Port("x", (1, self.d_model, 1, tokens), STREAM),), (logits,))
