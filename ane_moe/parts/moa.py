"""Attention whose queries and output are experts': all of them attend, weighed by a router."""

from torch import Tensor

from ane_moe.model.moa import MoaConfig
from ane_moe.parts.kv_cache import attend, updated
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.projection import Projection
from ane_moe.parts.rope import rotate
from ane_moe.parts.router import Router


class Moa(Mixer):
    """`y = x + sum_e gate_e * o_e(attention(q_e(norm(x))))` over one cache of keys and values.

    E = experts, K = heads, D = their channels. Expert by expert outside of attention, head by head
    inside, where the queries of a group share keys.
    """

    config: MoaConfig

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.router = Router(d, m.router)
        self.q = Projection(d, m.experts * m.width, rank=c.rank("q"))
        self.k = Projection(d, m.width, rank=c.rank("k"))
        self.v = Projection(d, m.width, rank=c.rank("v"))
        self.o = Projection(m.experts * m.width, d, bias=True, rank=c.rank("o"))

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.config.mixer
        gates, _ = self.router.gates(h, {})
        by_expert = self.q(h).reshape(m.experts, m.heads, m.head_dim, -1)  # (E, K, D, T)
        q = by_expert.transpose(0, 1).reshape(1, m.heads * m.experts, m.head_dim, -1)
        q = self._rotated(q, inputs)
        k = self._rotated(self.k(h).reshape(1, m.heads, m.head_dim, -1), inputs)
        v = self.v(h).reshape(1, m.heads, m.head_dim, -1)
        keys = updated("k_cache", k, inputs, self.config.explicit)
        values = updated("v_cache", v, inputs, self.config.explicit)
        attended = attend(q, keys, values, inputs["mask"], m.scale)  # (1, K E D, 1, T)
        by_head = attended.reshape(m.heads, m.experts, m.head_dim, -1)
        weighed = by_head.transpose(0, 1) * gates.reshape(m.experts, 1, 1, -1)  # (E, K, D, T)
        y = self.o(weighed.reshape(1, m.experts * m.width, 1, -1))
        return y, {"k_cache": keys, "v_cache": values}

    def _rotated(self, heads: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        m = self.config.mixer
        return rotate(heads, inputs["cos"], inputs["sin"], self.config.rotary, m.head_dim)
