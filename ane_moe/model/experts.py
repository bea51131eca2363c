"""Experts that the host calls, one by one or in groups, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ane_moe.model.mlp import MlpRanks, mlp_rows
from ane_moe.model.port import FFN_INPUT, STREAM, WEIGHT, Port, Ports
from ane_moe.model.residual import added_scale_row
from ane_moe.model.spec import MlpSpec, SharedSpec
from ane_moe.model.weight import Directions, Row, Weight


@dataclass(frozen=True)
class ExpertGroupConfig:
    """`d_model`: channels of what experts take and give, those of the stream or of a latent."""

    d_model: int
    expert: MlpSpec
    size: int = 1
    ranks: MlpRanks = (0, 0, 0)
    affine: bool = False
    slot: str = STREAM

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield from expert_rows(self.expert, self.d_model, self.size, self.ranks)
        if self.affine:
            yield added_scale_row(self.d_model)

    @property
    def gate_name(self) -> str:
        return "gate" if self.size == 1 else "gates"

    def ports(self, tokens: int) -> Ports:
        ports = _added(self.d_model, tokens, self.slot)
        gates = Port(self.gate_name, (1, self.size, 1, tokens), "gates.{0}")
        return Ports((*ports.inputs, gates), ports.outputs)


@dataclass(frozen=True)
class GivenExpertConfig:
    """An `expert` (a group of one) whose weights are inputs: one graph for all that are alike."""

    expert: ExpertGroupConfig

    def rows(self) -> Iterator[Row]:
        """None: nothing is bound to the graph."""
        return iter(())

    @property
    def given(self) -> dict[str, Weight]:
        """The weights, in their order, by the name of the input that each of them is."""
        found: dict[str, Weight] = {}
        for row in self.expert.rows():
            found[given_name(row.path)] = _whole(row, found)
        return found

    def ports(self, tokens: int) -> Ports:
        ports = self.expert.ports(tokens)
        inputs = (replace(port, slot=port.root) for port in ports.inputs)  # of any layer
        weights = (
            Port(name, parameter_shape(row.shape), f"{WEIGHT}.{row.path}")
            for name, row in self.given.items()
        )
        return Ports((*inputs, *weights), ports.outputs)


def _whole(row: Row, before: Mapping[str, Weight]) -> Weight:
    """The row of a weight as such; directions kept apart follow the weight that they are of."""
    if isinstance(row, Weight):
        return row
    assert isinstance(row, Directions)
    rows, columns = before[given_name(row.of)].shape
    reads_input = row.side == "in" and before[given_name(row.of)].reads in ("", "x")
    shape = (row.rank, columns) if row.side == "in" else (rows, row.rank)
    return Weight(row.path, shape, reads="x" if reads_input else row.path)


def given_name(path: str) -> str:
    """What the input is called that takes the weight at `path`."""
    return path.replace(".", "_")


def parameter_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`(out, in, 1, 1)` of a matrix, `(1, C, 1, 1)` of a vector: as parts have them."""
    return (*shape, 1, 1) if len(shape) == 2 else (1, *shape, 1, 1)


@dataclass(frozen=True)
class SharedExpertConfig:
    d_model: int
    shared: SharedSpec
    ranks: MlpRanks = (0, 0, 0)
    slot: str = STREAM

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        return shared_rows(self.shared, self.d_model, self.ranks)

    def ports(self, tokens: int) -> Ports:
        return _added(self.d_model, tokens, self.slot)


def _added(d_model: int, tokens: int, slot: str) -> Ports:
    """What is given the normed stream, and added to a slot."""
    stream = (1, d_model, 1, tokens)
    ffn_input = Port("ffn_input", stream, FFN_INPUT)
    return Ports((ffn_input,), (Port("y", stream, slot, "add"),))


def expert_rows(expert: MlpSpec, d_model: int, count: int, ranks: MlpRanks) -> Iterator[Row]:
    """The parameters of a list `experts` of gated MLPs."""
    rows = list(mlp_rows(expert, d_model, "experts", ranks))
    for index in range(count):
        yield from (row.under(f"experts.{index}") for row in rows)


def shared_rows(shared: SharedSpec, d_model: int, ranks: MlpRanks) -> Iterator[Row]:
    """The parameters of a shared expert, and of its gate where it has one."""
    for row in mlp_rows(shared.mlp, d_model, "shared", ranks):
        yield row.under("shared")
    if shared.gated:
        yield Weight("shared_gate.weight", (1, d_model))
