"""Mamba-2: a matrix for each head in the place of a cache, which decays and is added to.

A call of one token is one step of the recurrence. A call of several is one chunk of the dual form
(arXiv 2405.21060, section 6): what its tokens give each other is attention without a softmax,
`b' c` times what is left between two tokens, and the rest is products with the memory.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ane_moe.model.mamba2 import Mamba2Config
from ane_moe.parts.activation import silu
from ane_moe.parts.delta_net import (
    MOST,
    RATES,
    UNIT,
    constant,
    left,
    lost,
    softplus,
    token_count,
)
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.recent import advanced, joined
from ane_moe.parts.residual import vector
from ane_moe.parts.token_convolution import TokenConvolution


class Step(Projection):
    """How far a token moves each head: `(1, d, 1, T) -> (1, H, 1, T)`, from 0 up."""

    def __init__(self, d_model: int, heads: int, bias: bool):
        super().__init__(d_model, heads, bias)
        self.offset, self.decay = vector(heads), vector(heads)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return softplus(super().forward(x) + self.offset)

    def decays(self, step: Tensor) -> Tensor:
        """The logarithm of what is left after such steps, times -UNIT: from 0 to UNIT MOST."""
        rate = torch.exp((self.decay + math.log(UNIT)).clamp(*RATES))
        return (rate * step).clamp(0, UNIT * MOST)


class Skip(nn.Module):
    """`x * weight` by head, `(1, H, P, T)`."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = vector(heads)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Mamba2(Mixer):
    """`y = x + o(norm((S c + skip u) * silu(z)))`, where S has taken in the token."""

    config: Mamba2Config
    one_trace = False

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.z = Projection(d, m.inner, m.bias, c.rank("z"))
        self.u = Projection(d, m.inner, m.bias, c.rank("u"))
        self.b = Projection(d, m.shared, m.bias, c.rank("b"))
        self.c = Projection(d, m.shared, m.bias, c.rank("c"))
        self.step = Step(d, m.heads, m.bias)
        self.skip = Skip(m.heads)
        self.conv = TokenConvolution(m.channels, 1, m.taps, m.conv_bias)
        self.value_norm = RmsNorm(m.inner // m.groups, m.eps, axis=2, groups=m.groups)
        self.o = Projection(m.inner, d, m.bias, c.rank("o"))

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m, explicit = self.config.mixer, self.config.explicit
        new = torch.cat([self.u(h), self.b(h), self.c(h)], dim=1)
        seen = joined("recent", new, m.history, inputs)
        mixed = silu(self.conv(seen))
        u = mixed[:, : m.inner].reshape(1, m.heads, m.head_dim, -1)
        both = mixed[:, m.inner :].reshape(1, 2 * m.groups, m.state, -1)
        b, c = both[:, : m.groups], both[:, m.groups :]
        step = self.step(h).reshape(1, m.heads, 1, -1)
        if "real" in inputs:  # padding neither decays nor adds
            step = step * inputs["real"]
        take_in = chunk if "real" in inputs else one_step
        memory = inputs["memory"]
        given, change = take_in(memory, b, c, u * step, self.step.decays(step))
        kept = {
            "recent": advanced("recent", seen, "shift", inputs, explicit),
            "memory": memory + change if explicit else memory.add_(change),
        }
        return self.o(self._gated(given + self.skip(u), self.z(h))), kept

    def _gated(self, given: Tensor, z: Tensor) -> Tensor:
        """`(1, H, P, T)` and `(1, H P, 1, T)` to `(1, H P, 1, T)`."""
        m = self.config.mixer
        gated = given.reshape(1, m.inner, 1, -1) * silu(z)
        normed = self.value_norm(gated.reshape(1, m.groups, m.inner // m.groups, -1))
        return normed.reshape(1, m.inner, 1, -1)


def one_step(
    memory: Tensor, b: Tensor, c: Tensor, added: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: what the matrices give for its c, `(1, H, P, 1)`, and the change of the `memory`,
    `(1, H, P, N)`. `b` and `c` are `(1, G, N, 1)`, what is `added` `(1, H, P, 1)`, the decay
    `(1, H, 1, 1)`."""
    written = by_group(added, b) * b.transpose(2, 3)
    change = memory * lost(decay) + written.reshape(memory.shape)
    return (by_group(memory + change, c) @ c).reshape(added.shape), change


def chunk(
    memory: Tensor, b: Tensor, c: Tensor, added: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """`one_step` for T tokens one after the other: `(1, H, P, T)`, and the change of the memory.

    Matrices over tokens have the earlier token on axis 2. Each decay is the sum of what lies
    between two tokens, never a difference of sums: nothing cancels, and none is above 1.
    """
    tokens, heads = token_count(added), memory.shape[1]
    later = constant(np.tri(tokens, k=-1).T, added)  # 1 where axis 3 is after axis 2
    since = constant(np.tri(tokens).T, added)  # or the same token
    between = left((later * decay) @ since) * since  # (1, H, T, T)
    so_far, from_now = left(decay @ since), left(decay @ constant(np.tri(tokens, k=-1), added))
    rows, groups = b.transpose(2, 3), b.shape[1]
    weights = between.reshape(groups, heads // groups, tokens, tokens)
    weights = weights * (rows @ c).reshape(groups, 1, tokens, tokens)
    asked = (by_group(memory, c) @ c).reshape(added.shape)
    given = so_far * asked + added @ weights.reshape(1, heads, tokens, tokens)
    written = (by_group(added * from_now, b) @ rows).reshape(memory.shape)
    return given, memory * lost(decay.sum(3, keepdim=True)) + written


def by_group(heads: Tensor, shared: Tensor) -> Tensor:
    """Heads of a group one below the other, `(1, H, P, ...)` to `(1, G, H P / G, ...)`."""
    groups = shared.shape[1]
    return heads.reshape(1, groups, heads.shape[1] * heads.shape[2] // groups, heads.shape[3])
