"""Experts one by one or in groups, each a function of its own that the host calls for the tokens that chose it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ane_moe.blocks.mlp import GatedMlp, MlpRanks
from ane_moe.blocks.moe import tree_sum
from ane_moe.blocks.ports import Block, Ports
from ane_moe.blocks.projection import Projection
from ane_moe.spec import MlpSpec, SharedSpec


@dataclass(frozen=True)
class ExpertGroupConfig:
    d_model: int
    expert: MlpSpec
    size: int = 1
    ranks: MlpRanks = (0, 0, 0)


class ExpertGroup(Block):
    """`y = sum_e gate_e * expert_e(ffn_input)` over the experts of a group; neither norm nor residual."""

    def __init__(self, config: ExpertGroupConfig):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(GatedMlp(config.d_model, config.expert, config.ranks) for _ in range(config.size))
        self.gate_name = "gate" if config.size == 1 else "gates"

    def ports(self, tokens: int) -> Ports:
        stream = (1, self.config.d_model, 1, tokens)
        return Ports({"ffn_input": stream, self.gate_name: (1, self.config.size, 1, tokens)}, {"y": stream})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x, gates = inputs["ffn_input"], inputs[self.gate_name]
        if self.config.size == 1:
            return {"y": self.experts[0](x, gates)}
        return {"y": tree_sum([expert(x, gates[:, e : e + 1]) for e, expert in enumerate(self.experts)])}


@dataclass(frozen=True)
class SharedExpertConfig:
    d_model: int
    shared: SharedSpec
    ranks: MlpRanks = (0, 0, 0)


class SharedExpert(Block):
    """The expert every token passes through, weighted by its own gate where it has one."""

    def __init__(self, config: SharedExpertConfig):
        super().__init__()
        self.config = config
        self.shared = GatedMlp(config.d_model, config.shared.mlp, config.ranks)
        if config.shared.gated:
            self.shared_gate = Projection(config.d_model, 1)

    def ports(self, tokens: int) -> Ports:
        stream = (1, self.config.d_model, 1, tokens)
        return Ports({"ffn_input": stream}, {"y": stream})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["ffn_input"]
        return {"y": self.shared(x, torch.sigmoid(self.shared_gate(x)) if self.config.shared.gated else None)}
