"""What follows the parts of a layer whose sum is normed before it meets the stream, as data."""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.port import ADDED, STREAM, Port, Ports
from ane_moe.model.spec import NormSpec, after_rows
from ane_moe.model.weight import Row


@dataclass(frozen=True)
class JoinConfig:
    d_model: int
    norm: NormSpec

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        return after_rows(self.norm, self.d_model, "after")

    def ports(self, tokens: int) -> Ports:
        stream = (1, self.d_model, 1, tokens)
        return Ports(
            (Port("x", stream, STREAM), Port("added", stream, ADDED)), (Port("y", stream, STREAM),)
        )
