"""What follows the parts of a layer whose sum is normed before it meets the stream, as data: with
it goes what stands beside the experts."""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.mlp import MlpRanks, mlp_rows
from ane_moe.model.port import ADDED, STREAM, Port, Ports
from ane_moe.model.residual import ResidualSpec
from ane_moe.model.spec import MlpSpec, NormSpec, beside_rows
from ane_moe.model.weight import Row


@dataclass(frozen=True)
class JoinConfig:
    d_model: int
    norm: NormSpec
    residual: ResidualSpec
    beside: MlpSpec | None = None
    ranks: MlpRanks = (0, 0, 0)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        if self.beside is not None:
            rows = mlp_rows(self.beside, self.d_model, "dense", self.ranks)
            yield from beside_rows(rows, self.norm, self.d_model)
        yield from self.residual.added_rows(self.norm, self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = (1, self.d_model, 1, tokens)
        return Ports(
            (Port("x", stream, STREAM), Port("added", stream, ADDED)), (Port("y", stream, STREAM),)
        )
