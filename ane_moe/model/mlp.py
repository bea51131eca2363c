"""Gated MLPs as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ane_moe.model.port import STREAM, Port, Ports, beside_ports
from ane_moe.model.residual import PLAIN, ResidualSpec
from ane_moe.model.spec import (
    MlpSpec,
    NormSpec,
)
from ane_moe.model.weight import Row, with_directions

MlpRanks = tuple[int, int, int]  # directions kept apart from gate, up and down


def mlp_rows(mlp: MlpSpec, d_model: int, role: str, ranks: MlpRanks) -> Iterator[Row]:
    """The parameters of a GatedMlp, in its own order."""
    by_matrix = dict(zip(("gate", "up", "down"), ranks, strict=True))
    return with_directions(mlp.rows(d_model, role), by_matrix)


@dataclass(frozen=True)
class DenseConfig:
    d_model: int
    norm: NormSpec
    mlp: MlpSpec
    ranks: MlpRanks = (0, 0, 0)
    residual: ResidualSpec = PLAIN

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield from self.residual.read_rows(self.norm, self.d_model)
        for row in mlp_rows(self.mlp, self.d_model, "dense", self.ranks):
            yield row.under("mlp")
        yield from self.residual.added_rows(self.norm, self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        beside = beside_ports(stream, self.residual.parallel, self.residual.takes)
        return Ports((stream, *beside), (replace(stream, name="y"),))
