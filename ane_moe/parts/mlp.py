"""Gated MLPs: dense layers, experts and shared experts."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_moe.model.mlp import DenseConfig, MlpRanks
from ane_moe.model.spec import MlpSpec
from ane_moe.parts.block import Block
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import kept, make_residual, norm_before

# As good as no lower end for a gate: sigmoid(LOWEST) is 0. Open ends become infinite constants.
LOWEST = -2e4


def _silu_reaches(value: float) -> float:
    """The positive number whose silu is `value`, by Newton's method."""
    x = max(value, 1.0)
    for _ in range(60):
        share = 1 / (1 + math.exp(-x))
        x -= (x * share - value) / (share * (1 + x * (1 - share)))
    return x


class GatedMlp(nn.Module):
    """`down(scale * silu(gate(x)) * up(x))`, or with another activation that the spec says: `(1, d,
    1, T) -> (1, d, 1, T)`, scale `(1, 1, 1, T)` or none.

    silu is written out: the engine's own `silu` is off by up to 1.5e-2, and by 1.7e-3 at zero,
    where `gate * sigmoid(gate)`, which Apple's model-authoring rules ask for, is off by up to 7e-3
    and right at zero (docs/runtime.md). In just that order coremltools fuses the two back into
    `silu`, so `up` comes between. The scale (an expert's gate) acts before `down`, on
    fewer channels and smaller values; or on x, where the spec says so.
    """

    def __init__(self, d_model: int, spec: MlpSpec, ranks: MlpRanks = (0, 0, 0)):
        super().__init__()
        self.clamp, self.activation, self.squared = spec.clamp, spec.activation, spec.squared
        self.gate_enters, self.limit = spec.gate_enters, spec.limit
        if not spec.squared:
            self.gate = Projection(d_model, spec.width, spec.inner_bias, rank=ranks[0])
        self.up = Projection(d_model, spec.width, spec.inner_bias, rank=ranks[1])
        self.down = Projection(spec.width, d_model, bool(spec.bias), rank=ranks[2])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.gate_enters and scale is not None:
            x, scale = x * scale, None
        hidden = self._hidden(x)  # (1, I, 1, T)
        return self.down(hidden if scale is None else hidden * scale, scale)

    def _hidden(self, x: Tensor) -> Tensor:
        if self.squared:
            up = torch.relu(self.up(x))
            return up * up
        gate = self.gate(x)
        if self.activation == "gelu":
            return F.gelu(gate, approximate="tanh") * self.up(x)
        if self.limit is not None:
            # Of what is above it, silu is more than the limit, and of all else no more.
            gate = gate.clamp(LOWEST, _silu_reaches(self.limit))
            return torch.sigmoid(gate) * self.up(x).clamp(-self.limit, self.limit) * gate
        if self.clamp is None:
            return torch.sigmoid(gate) * self.up(x) * gate
        limit = self.clamp.limit
        gate, up = gate.clamp(LOWEST, limit), self.up(x).clamp(-limit, limit)
        return torch.sigmoid(gate * self.clamp.alpha) * (up + 1) * gate


class Dense(Block):
    """`y = x + mlp(norm(x))`: the feed-forward part of a layer without experts."""

    config: DenseConfig

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.config = config
        facts = (config.d_model, config.norm, config.residual)
        self.norm = norm_before(*facts)
        self.mlp = GatedMlp(config.d_model, config.mlp, config.ranks)
        self.residual = make_residual(*facts)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        h = self.norm(x)
        added = self.mlp(h)
        if self.config.residual.parallel:
            added = added + inputs["added"]
        if self.config.residual.takes:
            added = added + inputs["later"]
        return {"y": self.residual(kept(x, h, self.config.residual.keeps), added)}
