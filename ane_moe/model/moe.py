"""A mixture-of-experts layer, or a self-contained part of one, as data."""

from collections.abc import Iterator
from dataclasses import dataclass

from ane_moe.model.experts import expert_rows, shared_rows
from ane_moe.model.latent import LatentRanks, entering_rows, leaving_rows
from ane_moe.model.mlp import MlpRanks, mlp_rows
from ane_moe.model.port import ADDED, LATER, STREAM, How, Port, Ports, beside_ports
from ane_moe.model.residual import PLAIN, ResidualSpec, added_scale_row
from ane_moe.model.router import router_ports, router_rows
from ane_moe.model.spec import (
    MoeSpec,
    NormSpec,
    SharedSpec,
    beside_rows,
    router_norm_rows,
)
from ane_moe.model.weight import Row, Selection


@dataclass(frozen=True)
class MoeConfig:
    """`experts` is how many of the layer's experts this part computes; `first` marks the part that
    carries the residual and the shared expert, and in a layer whose halves are `parallel` what the
    mixer adds. Parts of equal size share one graph: which experts they hold is a weight."""

    d_model: int
    norm: NormSpec
    moe: MoeSpec
    experts: int
    first: bool
    soft: bool = False
    ranks: MlpRanks = (0, 0, 0)
    shared_ranks: MlpRanks = (0, 0, 0)
    residual: ResidualSpec = PLAIN
    beside_ranks: MlpRanks = (0, 0, 0)
    latent_ranks: LatentRanks = (0, 0)

    @property
    def split(self) -> bool:
        return self.experts < self.moe.router.experts

    @property
    def joined(self) -> bool:
        """Whether another function takes the sum of all parts, normed or out of a latent, to the
        stream."""
        apart = self.residual.norms != "before" or self.moe.latent is not None
        return self.split and apart

    @property
    def shared(self) -> SharedSpec | None:
        """The expert that every token passes, where this part computes it: a sum in a latent is no
        place for it."""
        elsewhere = self.split and self.moe.latent is not None
        return self.moe.shared if self.first and not elsewhere else None

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        d, moe = self.d_model, self.moe
        yield from self.residual.read_rows(self.norm, d)
        yield from router_norm_rows(self.norm, d, moe.router_norm)
        yield from (row.under("router") for row in router_rows(moe.router, d, self.soft))
        if moe.latent is not None:
            yield from entering_rows(moe.latent, d, self.latent_ranks)
        yield from expert_rows(moe.expert, moe.width(d), self.experts, self.ranks)
        if self.split:
            yield Selection("select.weight", (self.experts, moe.router.classes))
        if self.shared is not None:
            yield from shared_rows(self.shared, d, self.shared_ranks)
        if not self.joined:
            if moe.latent is not None:
                yield from leaving_rows(moe.latent, d, self.latent_ranks)
            if moe.beside is not None:
                rows = mlp_rows(moe.beside, d, "dense", self.beside_ranks)
                yield from beside_rows(rows, self.norm, d)
            yield from self._added_rows()

    def _added_rows(self) -> Iterator[Row]:
        if self.first:
            yield from self.residual.added_rows(self.norm, self.d_model)
        elif self.residual.affine:
            yield added_scale_row(self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        slot = ADDED if self.joined else LATER if self.residual.hands_on else STREAM
        width = self.moe.width(self.d_model) if self.joined else self.d_model
        how: How = "set" if self.first else "add"
        result = Port("y", (1, width, 1, tokens), slot, how)
        routing = router_ports(self.moe.router, tokens)
        beside = beside_ports(stream, self.residual.parallel and self.first)
        return Ports((stream, *beside, *routing.inputs), (result, *routing.outputs))
