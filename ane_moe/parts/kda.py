"""Kimi delta attention: a delta net whose matrices decay by channel."""

import math

import torch
from torch import Tensor

from ane_moe.model.kda import KdaConfig, KdaSpec
from ane_moe.parts.delta_net import MOST, RATES, UNIT, DeltaNet, softplus
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector
from ane_moe.parts.token_convolution import TokenConvolution


class ChannelDecay(Projection):
    """The logarithm of what is left of each channel, times -UNIT: `(1, C, 1, T) -> (1, H, Dk,
    T)`, from 0 to UNIT MOST."""

    def __init__(self, inputs: int, spec: KdaSpec):
        super().__init__(inputs, spec.keys, bias=True)
        self.rate = vector(spec.key_heads)
        self.heads, self.key_dim, self.floor = spec.key_heads, spec.key_dim, spec.floor

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        asked = super().forward(x).reshape(1, self.heads, self.key_dim, -1)
        rate = torch.exp((self.rate + math.log(UNIT)).clamp(*RATES))
        if self.floor is None:
            return (rate * softplus(asked)).clamp(0, UNIT * MOST)
        share = sigmoid(rate * (asked * (1 / UNIT)))
        return (share * (UNIT * self.floor)).clamp(0, UNIT * MOST)


class Kda(DeltaNet):
    """`y = x + o(sigmoid(z) * norm(S q))`, where S has taken in the token."""

    config: KdaConfig

    def add_gates(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        inner = m.rank or d
        if m.rank:
            self.z_down = Projection(d, m.rank, rank=c.rank("z_down"))
            self.decay_down = Projection(d, m.rank)
        self.z = Projection(inner, m.values, rank=c.rank("z"))
        self.beta = Projection(d, m.value_heads)
        self.decay = ChannelDecay(inner, m)
        self.query_conv = TokenConvolution(m.queries, 1, m.taps, bias=False)
        self.key_conv = TokenConvolution(m.keys, 1, m.taps, bias=False)
        self.value_conv = TokenConvolution(m.values, 1, m.taps, bias=False)

    def convolved(self, seen: Tensor) -> Tensor:
        first, second = self.config.mixer.queries, 2 * self.config.mixer.queries
        parts = (
            self.query_conv(seen[:, :first]),
            self.key_conv(seen[:, first:second]),
            self.value_conv(seen[:, second:]),
        )
        return torch.cat(parts, dim=1)

    def decays(self, h: Tensor) -> Tensor:
        return self.decay(self.decay_down(h) if self.config.mixer.rank else h)

    def gated(self, given: Tensor, h: Tensor) -> Tensor:
        z = self.z(self.z_down(h) if self.config.mixer.rank else h)
        return torch.sigmoid(z) * self.normed(given)


def sigmoid(x: Tensor) -> Tensor:
    """Small results as exact as large ones, by exponentials of what is not positive."""
    return torch.exp(-torch.relu(-x)) / (torch.exp(-x.abs()) + 1)
