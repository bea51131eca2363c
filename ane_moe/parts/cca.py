"""Compressed convolutional attention: queries and keys that have seen the tokens before them."""

import torch
from torch import Tensor, nn

from ane_moe.model.cca import CcaConfig
from ane_moe.parts.kv_cache import attend, updated
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.projection import Projection
from ane_moe.parts.recent import advanced, joined
from ane_moe.parts.residual import vector
from ane_moe.parts.rope import rotate
from ane_moe.parts.token_convolution import TokenConvolution

LEAST = 2**-14  # the smallest normal fp16 number
SQUARE = 2**-11  # less than the mean square of any vector of up to 1024 whose largest is 1


class Temperature(nn.Module):
    """A factor for each key head, `(1, K, D, T)`."""

    def __init__(self, kv_heads: int):
        super().__init__()
        self.weight = vector(kv_heads)

    def forward(self, keys: Tensor) -> Tensor:
        return keys * self.weight


class Cca(Mixer):
    """Keys and values go into the cache as they are attended to: convolved, scaled, rotated."""

    config: CcaConfig

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.q = Projection(d, m.heads * m.head_dim, rank=c.rank("q"))
        self.k = Projection(d, m.kv_heads * m.head_dim, rank=c.rank("k"))
        self.v_current = Projection(d, c.delayed, rank=c.rank("v_current"))
        self.v_delayed = Projection(d, c.delayed, rank=c.rank("v_delayed"))
        self.o = Projection(m.heads * m.head_dim, d, rank=c.rank("o"))
        self.by_channel = TokenConvolution(m.channels, 1, m.taps[0])
        self.by_head = TokenConvolution(m.channels, m.head_dim, m.taps[1])
        self.temperature = Temperature(m.kv_heads)

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        explicit = self.config.explicit
        q, k, seen = self._queries_and_keys(h, inputs)
        v, delayed = self._values(h, inputs)
        if "cos" in inputs:
            rotary, head_dim = self.config.rotary, self.config.mixer.head_dim
            q, k = (rotate(t, inputs["cos"], inputs["sin"], rotary, head_dim) for t in (q, k))
        keys, values = (
            updated("k_cache", k, inputs, explicit),
            updated("v_cache", v, inputs, explicit),
        )
        added = self.o(attend(q, keys, values, inputs["mask"], self.config.mixer.scale))
        kept = {
            "k_cache": keys,
            "v_cache": values,
            "qk_recent": advanced("qk_recent", seen, "qk_shift", inputs, explicit),
            "v_recent": advanced("v_recent", delayed, "v_shift", inputs, explicit),
        }
        return added, kept

    def _queries_and_keys(
        self, h: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(1, H, D, T)`, `(1, K, D, T)`, and what the convolutions saw, `(1, (H + K) D, 1, n +
        T)`."""
        m = self.config.mixer
        q, k = self.q(h), self.k(h)
        seen = joined("qk_recent", torch.cat([q, k], dim=1), m.history, inputs)
        mixed = self.by_head(self.by_channel(seen))
        # Each query head is averaged with its key head, and each key head with the mean of its
        # group.
        each = q.reshape(m.kv_heads, m.heads // m.kv_heads, m.head_dim, -1)  # (K, G, D, T)
        query_mean = (each + k.reshape(m.kv_heads, 1, m.head_dim, -1)) * 0.5
        key_mean = query_mean.mean(1, keepdim=True)
        width = m.heads * m.head_dim
        q = (mixed[:, :width] + query_mean.reshape(1, width, 1, -1)).reshape(
            1, m.heads, m.head_dim, -1
        )
        k = mixed[:, width:] + key_mean.reshape(1, m.kv_heads * m.head_dim, 1, -1)
        k = k.reshape(1, m.kv_heads, m.head_dim, -1)
        return _of_length_root(q), self.temperature(_of_length_root(k)), seen

    def _values(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(1, K, D, T)`, and the channels kept for the next token, `(1, K D / 2, 1, 1 + T)`."""
        m = self.config.mixer
        current = self.v_current(h)
        seen = joined("v_recent", self.v_delayed(h), 1, inputs)
        # A slice at the beginning: its end depends on the token count, its offset is 0.
        before = seen[:, :, :, :-1]
        return torch.cat([current, before], dim=1).reshape(1, m.kv_heads, m.head_dim, -1), seen


def _of_length_root(x: Tensor) -> Tensor:
    """Each head's vector at the length sqrt(D): `(1, H, D, T)`, without squares that leave fp16."""
    y = x / x.abs().amax(2, keepdim=True).clamp(min=LEAST)
    return y * torch.rsqrt((y * y).mean(2, keepdim=True).clamp(min=SQUARE))
