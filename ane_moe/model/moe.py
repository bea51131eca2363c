"""A mixture-of-experts layer, or a self-contained part of one, as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ane_moe.model.experts import added_scale_row, expert_rows, shared_rows
from ane_moe.model.mlp import MlpRanks
from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.router import router_ports, router_rows
from ane_moe.model.spec import MoeSpec, NormSpec, residual_rows
from ane_moe.model.weight import Row, Selection, Weight


@dataclass(frozen=True)
class MoeConfig:
    """`experts` is how many of the layer's experts this part computes; `first` marks the part that
    carries the residual and the shared expert. Parts of equal size share one graph: which experts
    they hold is a weight."""

    d_model: int
    norm: NormSpec
    moe: MoeSpec
    experts: int
    first: bool
    soft: bool = False
    ranks: MlpRanks = (0, 0, 0)
    shared_ranks: MlpRanks = (0, 0, 0)
    affine: bool = False

    @property
    def split(self) -> bool:
        return self.experts < self.moe.router.experts

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        d, moe = self.d_model, self.moe
        yield Weight("norm.weight", (d,))
        yield from (row.under("router") for row in router_rows(moe.router, d, self.soft))
        yield from expert_rows(moe.expert, d, self.experts, self.ranks)
        if self.split:
            yield Selection("select.weight", (self.experts, moe.router.classes))
        if moe.shared is not None and self.first:
            yield from shared_rows(moe.shared, d, self.shared_ranks)
        if self.affine:
            yield from residual_rows(d) if self.first else (added_scale_row(d),)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        result = replace(stream, name="y", how="set" if self.first else "add")
        routing = router_ports(self.moe.router, tokens)
        return Ports((stream, *routing.inputs), (result, *routing.outputs))
