"""Experts one by one or in groups, each a function of its own that the host calls for the tokens
that chose it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ane_moe.model.port import FFN_INPUT, STREAM, Port, Ports
from ane_moe.model.spec import MlpSpec, SharedSpec, residual_rows
from ane_moe.model.weight import Row, Weight
from ane_moe.parts.block import Block
from ane_moe.parts.mlp import GatedMlp, MlpRanks, mlp_rows
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import residual


@dataclass(frozen=True)
class ExpertGroupConfig:
    d_model: int
    expert: MlpSpec
    size: int = 1
    ranks: MlpRanks = (0, 0, 0)
    affine: bool = False

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield from expert_rows(self.expert, self.d_model, self.size, self.ranks)
        if self.affine:
            yield added_scale_row(self.d_model)

    @property
    def gate_name(self) -> str:
        return "gate" if self.size == 1 else "gates"

    def ports(self, tokens: int) -> Ports:
        ports = _added(self.d_model, tokens)
        gates = Port(self.gate_name, (1, self.size, 1, tokens), "gates.{0}")
        return Ports((*ports.inputs, gates), ports.outputs)


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


def added_scale_row(d_model: int) -> Weight:
    """What an affine residual multiplies by what is added on its own."""
    return next(row for row in residual_rows(d_model) if row.path.endswith("added_scale"))


def tree_sum(terms: list[Tensor]) -> Tensor:
    """Pairwise sums: rounding grows with the depth, and wide fan-ins compile slowly (ane-guide,
    chapter 19)."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


class ExpertGroup(Block):
    """`y = sum_e gate_e * expert_e(ffn_input)` over the experts of a group; neither norm nor
    residual."""

    config: ExpertGroupConfig

    def __init__(self, config: ExpertGroupConfig):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(
            GatedMlp(config.d_model, config.expert, config.ranks) for _ in range(config.size)
        )
        self.residual = residual(config.d_model, config.affine, alone=True)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, gates = inputs["ffn_input"], inputs[self.config.gate_name]
        if self.config.size == 1:
            return {"y": self.residual.alone(self.experts[0](x, gates))}
        parts = [expert(x, gates[:, e : e + 1]) for e, expert in enumerate(self.experts)]
        return {"y": self.residual.alone(tree_sum(parts))}


@dataclass(frozen=True)
class SharedExpertConfig:
    d_model: int
    shared: SharedSpec
    ranks: MlpRanks = (0, 0, 0)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        return shared_rows(self.shared, self.d_model, self.ranks)

    def ports(self, tokens: int) -> Ports:
        return _added(self.d_model, tokens)


def _added(d_model: int, tokens: int) -> Ports:
    """What is given the normed stream, and added to the stream."""
    stream = (1, d_model, 1, tokens)
    ffn_input = Port("ffn_input", stream, FFN_INPUT)
    return Ports((ffn_input,), (Port("y", stream, STREAM, "add"),))


class SharedExpert(Block):
    """The expert every token passes through, weighted by its own gate where it has one."""

    config: SharedExpertConfig

    def __init__(self, config: SharedExpertConfig):
        super().__init__()
        self.config = config
        self.shared = GatedMlp(config.d_model, config.shared.mlp, config.ranks)
        if config.shared.gated:
            self.shared_gate = Projection(config.d_model, 1)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["ffn_input"]
        return {
            "y": self.shared(
                x, torch.sigmoid(self.shared_gate(x)) if self.config.shared.gated else None
            )
        }
