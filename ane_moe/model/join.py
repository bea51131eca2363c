"""What follows the parts of a layer whose sum is normed, or taken out of a latent, before it meets
the stream, as data: with it goes what stands beside the experts, or is shared."""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.experts import shared_rows
from ane_moe.model.latent import LatentRanks, leaving_rows
from ane_moe.model.mlp import MlpRanks, mlp_rows
from ane_moe.model.port import ADDED, STREAM, Port, Ports
from ane_moe.model.residual import ResidualSpec
from ane_moe.model.spec import LatentSpec, MlpSpec, NormSpec, SharedSpec, beside_rows
from ane_moe.model.weight import Row


@dataclass(frozen=True)
class JoinConfig:
    d_model: int
    norm: NormSpec
    residual: ResidualSpec
    beside: MlpSpec | None = None
    ranks: MlpRanks = (0, 0, 0)
    latent: LatentSpec | None = None
    shared: SharedSpec | None = None
    latent_ranks: LatentRanks = (0, 0)
    shared_ranks: MlpRanks = (0, 0, 0)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        if self.latent is not None:
            yield from leaving_rows(self.latent, self.d_model, self.latent_ranks)
        if self.shared is not None:
            yield from self.residual.read_rows(self.norm, self.d_model)
            yield from shared_rows(self.shared, self.d_model, self.shared_ranks)
        if self.beside is not None:
            rows = mlp_rows(self.beside, self.d_model, "dense", self.ranks)
            yield from beside_rows(rows, self.norm, self.d_model)
        yield from self.residual.added_rows(self.norm, self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = (1, self.d_model, 1, tokens)
        width = self.latent.width if self.latent else self.d_model
        added = Port("added", (1, width, 1, tokens), ADDED)
        return Ports((Port("x", stream, STREAM), added), (Port("y", stream, STREAM),))
