"""Grouped-query attention over a KV cache that is written by mask."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ane_moe.model.attention import AttentionConfig, SharedAttentionConfig
from ane_moe.model.port import PASSED
from ane_moe.model.spec import OF_KEYS_AND_VALUES, Temperature
from ane_moe.parts.kv_cache import attend, updated
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.norm import RmsNorm, UnitNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import vector
from ane_moe.parts.rope import rotate


class Sinks(nn.Module):
    """A score for each head, `(1, H, T, 1)`, shaped by a column of the mask `(1, 1, T, S)`."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = vector(heads)

    def forward(self, mask: Tensor) -> Tensor:
        return mask[:, :, :, :1] * 0 + self.weight


class HeadBias(nn.Module):
    """A number for each head, added to `(1, H, V, T)`."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = vector(heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Rounded(nn.Module):
    """`clip(round(x / s), -128, 127) * s`: what 8 bits hold of keys or values, `(1, K, D, T)`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = vector(1)

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.weight).round().clamp(-128, 127) * self.weight


def factor_of(temperature: Temperature, passed: Tensor) -> Tensor:
    """What queries are multiplied by, `(1, 1, 1, T)` as `passed` is."""
    grown = passed * temperature.scale
    return torch.exp(grown) if temperature.power else grown + 1


class Attention(Mixer):
    """`y = x + attention(norm(x))` with the new keys and values written into the cache first."""

    config: AttentionConfig
    q_norm: UnitNorm
    k_norm: UnitNorm

    def add_projections(self) -> None:
        c, m, d = self.config, self.config.mixer, self.config.d_model
        self.q = Projection(d, m.heads * m.head_dim, m.qkv_bias, c.rank("q"))
        self.k = Projection(d, m.kv_heads * m.head_dim, m.qkv_bias, c.rank("k"))
        if not m.keys_are_values:
            self.v = Projection(d, m.kv_heads * m.value, m.qkv_bias, c.rank("v"))
        self.o = Projection(m.heads * m.value, d, m.o_bias, c.rank("o"))
        if m.qk_norm in ("head", "rotated"):
            self.q_norm = RmsNorm(m.head_dim, m.qk_norm_eps, axis=2)
            self.k_norm = RmsNorm(m.head_dim, m.qk_norm_eps, axis=2)
        elif m.qk_norm == "full":
            self.q_norm = RmsNorm(m.heads * m.head_dim, m.qk_norm_eps)
            self.k_norm = RmsNorm(m.kv_heads * m.head_dim, m.qk_norm_eps)
        elif m.qk_norm == "unit":
            self.q_norm = self.k_norm = UnitNorm(m.qk_norm_eps, axis=2)
        if m.v_norm:
            self.v_norm = UnitNorm(m.qk_norm_eps, axis=2)
        self.sinks = Sinks(m.heads) if m.sinks else None
        if m.gate != "none":
            width = m.heads if m.gate_by_head else m.heads * m.value
            self.gate = Projection(d, width, rank=c.rank("gate"))
        if m.gate_bias:
            self.gate_bias = HeadBias(m.heads)
        if m.rounded:
            self.k_scale, self.v_scale = Rounded(), Rounded()

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.config.mixer
        q, k, v = self._heads(h, inputs.get("cos"), inputs.get("sin"))
        if m.temperature is not None:
            q = q * factor_of(m.temperature, inputs[PASSED])
        if m.rounded:
            k, v = self.k_scale(k), self.v_scale(v)
        keys = updated("k_cache", k, inputs, self.config.explicit)
        values = updated("v_cache", v, inputs, self.config.explicit)
        attended = self._gated(self._attend(q, keys, values, inputs["mask"]), h)
        return self.o(attended), {"k_cache": keys, "v_cache": values}

    def _gated(self, attended: Tensor, h: Tensor) -> Tensor:
        """What is attended to, `(1, H V, 1, T)`, times the gate that `h` opens, if there is one."""
        m = self.config.mixer
        if m.gate == "none":
            return attended
        gate = self.gate(h)
        if m.gate_bias:
            biased = self.gate_bias(gate.reshape(1, m.heads, m.value, -1))
            gate = biased.reshape(1, m.heads * m.value, 1, -1)
        gate = torch.sigmoid(gate) if m.gate == "sigmoid" else F.softplus(gate)
        if not m.gate_by_head:
            return attended * gate
        by_head = attended.reshape(m.heads, m.value, 1, -1) * gate.reshape(m.heads, 1, 1, -1)
        return by_head.reshape(1, m.heads * m.value, 1, -1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        sinks, m = self.sinks(mask) if self.sinks is not None else None, self.config.mixer
        return attend(q, keys, values, mask, m.scale, sinks, m.value_dim)

    def _heads(
        self, h: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, normalise, clip and rotate: `(1, H, D, T)`, `(1, K, D, T)`, `(1, K, V, T)`."""
        m = self.config.mixer
        q, k = self.q(h), self.k(h)
        v = k if m.keys_are_values else self.v(h)
        if m.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if m.clip_qkv is not None:
            q, k, v = (t.clamp(-m.clip_qkv, m.clip_qkv) for t in (q, k, v))
        q = q.reshape(1, m.heads, m.head_dim, -1)
        k = k.reshape(1, m.kv_heads, m.head_dim, -1)
        v = v.reshape(1, m.kv_heads, m.value, -1)
        if m.v_norm:
            v = self.v_norm(v)
        if m.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = (rotate(t, cos, sin, self.config.rotary, m.head_dim) for t in (q, k))
        if m.qk_norm in ("rotated", "unit"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class SharedAttention(Attention):
    """`y = x + attention(norm(x))` over caches that another layer has written for these tokens."""

    config: SharedAttentionConfig

    def add_projections(self) -> None:
        super().add_projections()
        for name in OF_KEYS_AND_VALUES:
            self._modules.pop(name, None)

    def mix(self, h: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m, q = self.config.mixer, self._queries(h, inputs.get("cos"), inputs.get("sin"))
        if m.temperature is not None:
            q = q * factor_of(m.temperature, inputs[PASSED])
        attended = self._attend(q, inputs["k_cache"], inputs["v_cache"], inputs["mask"])
        return self.o(self._gated(attended, h)), {}

    def _queries(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """As those of `_heads`, `(1, H, D, T)`."""
        m, q = self.config.mixer, self.q(h)
        if m.qk_norm == "full":
            q = self.q_norm(q)
        if m.clip_qkv is not None:
            q = q.clamp(-m.clip_qkv, m.clip_qkv)
        q = q.reshape(1, m.heads, m.head_dim, -1)
        if m.qk_norm == "head":
            q = self.q_norm(q)
        if cos is not None and sin is not None:
            q = rotate(q, cos, sin, self.config.rotary, m.head_dim)
        return self.q_norm(q) if m.qk_norm in ("rotated", "unit") else q
