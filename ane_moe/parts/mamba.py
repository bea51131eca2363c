"""Mamba: a row of numbers for each channel in the place of a cache.

A call of one token is one step of the recurrence. In a call of several each token gathers what the
token before it left, then what two left, then four, until it has all (Hillis and Steele's scan).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ane_moe.model.mamba import MambaConfig
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
from ane_moe.parts.mamba2 import Skip
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.recent import advanced, joined
from ane_moe.parts.token_convolution import TokenConvolution

# Steps are in these parts, since sums of them have a resolution as sums of decays do; and no sum is
# above what fp16 holds.
PARTS = 2 * UNIT
LONGEST = 2.0**14


class Decay(nn.Module):
    """The rate of each number, `(1, C, N, 1)`: of the logarithm of what is left of it, times -UNIT,
    by steps in PARTS."""

    def __init__(self, channels: int, state: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, state, 1))

    def forward(self) -> Tensor:
        return torch.exp((self.weight + math.log(UNIT / PARTS)).clamp(*RATES))


class Mamba(Mixer):
    """`y = x + o((s c + skip u) * silu(z))`, where s has taken in the token."""

    config: MambaConfig
    one_trace = False

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.u = Projection(d, m.inner, m.bias, c.rank("u"))
        self.z = Projection(d, m.inner, m.bias, c.rank("z"))
        self.conv = TokenConvolution(m.inner, 1, m.taps, m.conv_bias)
        self.step_in = Projection(m.inner, m.rank)
        self.b, self.c = Projection(m.inner, m.state), Projection(m.inner, m.state)
        self.step_in_norm = RmsNorm(m.rank, m.eps)
        self.b_norm, self.c_norm = RmsNorm(m.state, m.eps), RmsNorm(m.state, m.eps)
        self.step = Projection(m.rank, m.inner, bias=True)
        self.decay = Decay(m.inner, m.state)
        self.skip = Skip(m.inner)
        self.o = Projection(m.inner, d, m.bias, c.rank("o"))

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m, explicit, memory = self.config.mixer, self.config.explicit, inputs["memory"]
        seen = joined("recent", self.u(h), m.history, inputs)
        u = silu(self.conv(seen))  # (1, C, 1, T)
        step = softplus(self.step(self.step_in_norm(self.step_in(u))))
        b, c = (
            norm(way(u)).reshape(1, 1, m.state, -1)
            for norm, way in ((self.b_norm, self.b), (self.c_norm, self.c))
        )
        if "real" in inputs:  # padding neither decays nor adds
            step = step * inputs["real"]
        take_in = chunk if "real" in inputs else one_step
        numbers = memory.reshape(1, m.inner, m.state, 1)
        given, change = take_in(numbers, c, step * u * b, step * PARTS, self.decay())
        change = change.reshape(memory.shape)
        kept = {
            "recent": advanced("recent", seen, "shift", inputs, explicit),
            "memory": memory + change if explicit else memory.add_(change),
        }
        return self.o((given + self.skip(u)) * silu(self.z(h))), kept


def one_step(
    memory: Tensor, c: Tensor, added: Tensor, steps: Tensor, rates: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: what the `memory`, `(1, C, N, 1)`, gives for its c, `(1, C, 1, 1)`, and the change
    of the memory. `c` is `(1, 1, N, 1)`, what is `added` `(1, C, N, 1)`, the steps are `(1, C, 1,
    1)`, the rates `(1, C, N, 1)`."""
    change = added + memory * lost(decays(rates, steps))
    return ((memory + change) * c).sum(2, keepdim=True), change


def chunk(
    memory: Tensor, c: Tensor, added: Tensor, steps: Tensor, rates: Tensor
) -> tuple[Tensor, Tensor]:
    """`one_step` for T tokens one after the other: `(1, C, 1, T)`, and the change of the memory.

    Each decay is of a sum of steps, never of a product of decays: nothing is rounded twice.
    """
    tokens, size = token_count(added), 1
    while size < tokens:
        # So far `added` and `steps` are of the last `size` tokens up to each; now of twice as many.
        before = constant(np.eye(tokens, k=size), added)
        added = added + left(decays(rates, steps)) * (added @ before)
        steps = (steps + steps @ before).clamp(0, LONGEST)
        size *= 2
    whole, last = decays(rates, steps), constant(np.eye(tokens)[:, -1:], added)
    given = ((added + left(whole) * memory) * c).sum(2, keepdim=True)
    return given, added @ last + memory * lost(whole @ last)


def decays(rates: Tensor, steps: Tensor) -> Tensor:
    """`(1, C, N, T)`, from 0 to UNIT MOST."""
    return (rates * steps).clamp(0, UNIT * MOST)
