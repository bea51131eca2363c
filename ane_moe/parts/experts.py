"""Experts one by one or in groups, each a function of its own that the host calls for the tokens
that chose it."""

import torch
from torch import Tensor, nn

from ane_moe.model.experts import ExpertGroupConfig, GivenExpertConfig, SharedExpertConfig
from ane_moe.model.mlp import MlpRanks
from ane_moe.model.spec import SharedSpec
from ane_moe.parts.block import Block, give
from ane_moe.parts.mlp import GatedMlp
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import residual_alone


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
        self.residual = residual_alone(config.d_model, config.affine)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, gates = inputs["ffn_input"], inputs[self.config.gate_name]
        if self.config.size == 1:
            return {"y": self.residual.alone(self.experts[0](x, gates))}
        parts = [expert(x, gates[:, e : e + 1]) for e, expert in enumerate(self.experts)]
        return {"y": self.residual.alone(tree_sum(parts))}


class GivenExpert(Block):
    """An expert whose weights are inputs: the graph of `ExpertGroup`, bound to none of them."""

    config: GivenExpertConfig

    def __init__(self, config: GivenExpertConfig):
        super().__init__()
        self.config = config
        self.unbound = [ExpertGroup(config.expert)]  # in a list: none of its parameters are ours

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        (expert,) = self.unbound
        for name, row in self.config.given.items():
            give(expert, row.path, inputs.pop(name))
        outputs: dict[str, Tensor] = expert(**inputs)
        return outputs


class WithShared(Block):
    """A block that holds the expert every token passes through, weighted by its own gate where it
    has one."""

    def hold(self, d_model: int, shared: SharedSpec, ranks: MlpRanks) -> None:
        """Take in its modules."""
        self.shared = GatedMlp(d_model, shared.mlp, ranks)
        self.shared_gate = Projection(d_model, 1) if shared.gated else None

    def of_shared(self, x: Tensor) -> Tensor:
        """What it gives for the normed stream, each `(1, d, 1, T)`."""
        gate = self.shared_gate
        given: Tensor = self.shared(x, None if gate is None else torch.sigmoid(gate(x)))
        return given


class SharedExpert(WithShared):
    """It alone."""

    config: SharedExpertConfig

    def __init__(self, config: SharedExpertConfig):
        super().__init__()
        self.config = config
        self.hold(config.d_model, config.shared, config.ranks)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"y": self.of_shared(inputs["ffn_input"])}
