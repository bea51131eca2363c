"""Multi-head latent attention, with what makes keys and values of latents on the other side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_moe.model.mla import MlaConfig
from ane_moe.model.port import PASSED
from ane_moe.parts.indexer import Indexer
from ane_moe.parts.kv_cache import attend, updated
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector
from ane_moe.parts.rope import rotate


class ByHead(nn.Module):
    """A matrix for each head, `(H W, C)`."""

    def __init__(self, heads: int, width: int, channels: int):
        super().__init__()
        self.heads, self.width, self.channels = heads, width, channels
        self.weight = nn.Parameter(torch.empty(heads * width, channels, 1, 1))

    def backwards(self, x: Tensor) -> Tensor:
        """`(1, H W, 1, T) -> (1, H, C, T)`: each head's transposed."""
        matrices = self.weight.reshape(1, self.heads, self.width, self.channels)
        return matrices.transpose(2, 3) @ x.reshape(1, self.heads, self.width, -1)

    def forward(self, x: Tensor) -> Tensor:
        """`(1, H C, 1, T) -> (1, H W, 1, T)`."""
        return F.conv2d(x, self.weight, groups=self.heads)


class Growth(nn.Module):
    """What each head's queries are multiplied by: `(1, 1, 1, T) -> (1, H, 1, T)`."""

    def __init__(self, heads: int):
        super().__init__()
        self.scale, self.bias = vector(heads), vector(heads)

    def forward(self, passed: Tensor) -> Tensor:
        return passed * self.scale + self.bias


class Mla(Mixer):
    """`y = x + attention(norm(x))` over a cache of latents and of the key that all heads share."""

    config: MlaConfig

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        inner = d
        if m.q_rank:
            self.q_down = Projection(d, m.q_rank, m.bias, c.rank("q_down"))
            self.q_norm = RmsNorm(m.q_rank, m.latent_eps)
            inner = m.q_rank * (1 + m.gated_by_query)
        self.q_nope = Projection(inner, m.heads * m.nope, rank=c.rank("q_nope"))
        if m.rotated:
            self.q_rotated = Projection(inner, m.heads * m.rotated, rank=c.rank("q_rotated"))
        self.latent = Projection(d, m.kv_rank, m.bias, c.rank("latent"))
        if m.rotated:
            self.k_rotated = Projection(d, m.rotated, m.bias, c.rank("k_rotated"))
        self.latent_norm = RmsNorm(m.kv_rank, m.latent_eps)
        if m.key_norm:
            self.k_norm = RmsNorm(m.rotated, m.latent_eps)
        self.key_of = ByHead(m.heads, m.nope, m.kv_rank)
        self.value_of = ByHead(m.heads, m.value, m.kv_rank)
        self.o = Projection(m.heads * m.value, d, m.bias, c.rank("o"))
        if m.gated:
            self.gate = Projection(d, m.heads, rank=c.rank("gate"))
        if m.gated_by_query:
            self.gate = Projection(inner, m.heads * m.value, rank=c.rank("gate"))

        if m.grows:
            self.growth = Growth(m.heads)
        if m.indexer and m.q_rank:
            ranks = c.rank("index.q"), c.rank("index.k")
            self.index = Indexer(d, m.q_rank, m.indexer, ranks)

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.config.mixer
        inner = self._inner(h)
        q, new = self._query(inner, inputs), self._kept(h, inputs)
        cache = updated("cache", new, inputs, self.config.explicit)
        mask, kept = self._chosen(h, inner, inputs)
        latents = cache[:, :, : m.kv_rank]
        attended = attend(q, cache, latents, mask, m.scale, width=m.kv_rank)
        return self.o(self._gated(self.value_of(attended), h, inner)), {"cache": cache, **kept}

    def _chosen(
        self, h: Tensor, inner: Tensor, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mask of what is seen, and what an indexer keeps, where there is one."""
        m, pairs = self.config.mixer, self.config.rotary
        if m.indexer is None or m.q_rank is None:
            return inputs["mask"], {}
        new = self.index.key(h, inputs, pairs)
        keys = updated("index_cache", new, inputs, self.config.explicit)
        seen = self.index.seen(h, inner[:, : m.q_rank], keys, inputs, pairs)
        return seen, {"index_cache": keys}

    def _gated(self, attended: Tensor, h: Tensor, inner: Tensor) -> Tensor:
        """What is attended to, `(1, H V, 1, T)`, times each head's gate, or each channel's, if
        there is one."""
        m = self.config.mixer
        if m.gated_by_query:
            return attended * torch.sigmoid(self.gate(inner))
        if not m.gated:
            return attended
        gate = torch.sigmoid(self.gate(h)).reshape(m.heads, 1, 1, -1)
        by_head = attended.reshape(m.heads, m.value, 1, -1) * gate
        return by_head.reshape(1, m.heads * m.value, 1, -1)

    def _inner(self, h: Tensor) -> Tensor:
        """What queries are made of."""
        m = self.config.mixer
        if not m.q_rank:
            return h
        latent = self.q_down(h)
        normed = self.q_norm(latent)
        return torch.cat([normed, latent], dim=1) if m.gated_by_query else normed

    def _query(self, inner: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """`(1, H, R + r, T)`: against latents, and against the key that is shared."""
        m = self.config.mixer
        parts = [self.key_of.backwards(self.q_nope(inner))]
        if m.rotated:
            rotated = self.q_rotated(inner).reshape(1, m.heads, m.rotated, -1)
            parts.append(self._rotated(rotated, inputs))
        q = torch.cat(parts, dim=2)
        return q * self.growth(inputs[PASSED]) if m.grows else q

    def _kept(self, h: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """`(1, 1, R + r, T)`."""
        m = self.config.mixer
        latent = self.latent_norm(self.latent(h)).reshape(1, 1, m.kv_rank, -1)
        if not m.rotated:
            return latent
        shared = self.k_rotated(h)
        shared = self.k_norm(shared) if m.key_norm else shared
        key = shared.reshape(1, 1, m.rotated, -1)
        return torch.cat([latent, self._rotated(key, inputs)], dim=2)

    def _rotated(self, heads: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        if "cos" not in inputs:
            return heads
        m = self.config.mixer
        return rotate(heads, inputs["cos"], inputs["sin"], self.config.rotary, m.rotated)
