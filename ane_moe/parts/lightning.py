"""Lightning attention: a matrix for each head in the place of a cache, which decays at one rate.

A call of one token is one step of the recurrence. A call of several is one chunk, of products and
masks alone.
"""

import torch
from torch import Tensor, nn

from ane_moe.model.lightning import LightningConfig
from ane_moe.parts.activation import silu
from ane_moe.parts.delta_net import UNIT, among_heads, lost, recalled, token_count
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector

# Of values, which nothing but a norm sees: where hardly anything decays, sums of thousands of
# tokens are to stay inside fp16.
SHARE = 1 / 16


class Slopes(nn.Module):
    """How fast each head forgets: `(1, H, 1, 1)`."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = vector(heads)


class Lightning(Mixer):
    """`y = x + o(sigmoid(gate) * norm(S q))`, where S has taken in the token."""

    config: LightningConfig
    one_trace = False

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.query = Projection(d, m.channels, rank=c.rank("query"))
        self.key = Projection(d, m.channels, rank=c.rank("key"))
        self.value = Projection(d, m.channels, rank=c.rank("value"))
        self.gate = Projection(d, m.channels, rank=c.rank("gate"))
        self.slope = Slopes(m.heads)
        self.mixed_norm = RmsNorm(m.channels, m.eps * SHARE**2)
        self.o = Projection(m.channels, d, rank=c.rank("o"))

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m, memory = self.config.mixer, inputs["memory"]
        projected = (silu(of(h)) for of in (self.query, self.key, self.value))
        q, k, v = (one.reshape(1, m.heads, m.head_dim, -1) for one in projected)
        v, decay = v * SHARE, self.slope.weight * UNIT
        if "real" in inputs:  # padding neither decays nor writes
            v, decay = v * inputs["real"], decay * inputs["real"]
            _, of_queries = among_heads(q, k, decay, token_count(v))
            given, change = recalled(memory, q, k, v, of_queries, decay)
        else:
            change = memory * lost(decay) + v * k.transpose(2, 3)
            given = (memory + change) @ q
        normed = self.mixed_norm(given.reshape(1, m.channels, 1, -1))
        return self.o(torch.sigmoid(self.gate(h)) * normed), self.kept(change, inputs)

    def kept(self, change: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The memory and what was rounded away of it, which is tried again with the next change."""
        memory, rest = inputs["memory"], inputs["rest"]
        due = change + rest
        done = (memory + due) - memory  # of numbers near each other, exact
        if self.config.explicit:
            return {"memory": memory + done, "rest": due - done}
        left_over = due - done
        return {"memory": memory.add_(done), "rest": rest.mul_(0).add_(left_over)}
