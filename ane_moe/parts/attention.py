"""Grouped-query attention over a KV cache that is written by mask."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.spec import GqaSpec, NormSpec
from ane_moe.model.weight import Row, with_directions
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.rope import rotate


@dataclass(frozen=True)
class AttentionConfig:
    """`rotary` is the number of rotated channel pairs r (0: no RoPE); `slots` the cache width S; `explicit` makes the
    cache plain inputs and outputs instead of Core ML state."""

    d_model: int
    norm: NormSpec
    mixer: GqaSpec
    rotary: int
    slots: int
    explicit: bool = False
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)     # directions kept apart from q, k, v and o

    @property
    def caches(self) -> tuple[Port, ...]:
        """The KV caches, state or not."""
        cache = (1, self.mixer.kv_heads, self.mixer.head_dim, self.slots)
        return tuple(Port(name, cache, f"state.{{0}}.{name}") for name in ("k_cache", "v_cache"))

    def ports(self, tokens: int) -> Ports:
        mixer, row = self.mixer, (1, 1, tokens, self.slots)
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        rotary = (Port(name, (1, 1, self.rotary, tokens), f"rope.{mixer.rope}.{name}")
                  for name in ("cos", "sin") if self.rotary)
        inputs = (
            stream,
            *rotary,
            Port("mask", row, f"mask.{mixer.window or 'all'}"),
            Port("write", row, "write"),
            Port("keep", (1, 1, 1, self.slots), "keep"),
        )
        return with_states(Ports(inputs, (replace(stream, name="y"),)), self.caches, self.explicit)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        return with_directions(self.mixer.rows(self.d_model), dict(zip("qkvo", self.ranks, strict=True)))


def with_states(ports: Ports, states: tuple[Port, ...], explicit: bool) -> Ports:
    """`ports` with the `states` of a part: Core ML's own, or inputs and outputs beside the others."""
    if not explicit:
        return replace(ports, states=states)
    written = (replace(state, name=f"{state.name}_out") for state in states)
    return Ports((*ports.inputs, *states), (*ports.outputs, *written))


class Attention(Block):
    """`y = x + attention(norm(x))` with the new keys and values written into the cache first.

    `write` holds one one-hot row per token and `keep` the untouched slots, so that the cache is rewritten by products
    and sums: slices at run-time offsets leave the engine. A group's query heads are folded into the token axis, which
    keeps every product at rank 4 without repeating keys and values.
    """

    config: AttentionConfig
    q_norm: RmsNorm
    k_norm: RmsNorm

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        m, d = config.mixer, config.d_model
        self.norm = RmsNorm(d, config.norm.eps)
        ranks = config.ranks
        self.q = Projection(d, m.heads * m.head_dim, m.qkv_bias, ranks[0])
        self.k = Projection(d, m.kv_heads * m.head_dim, m.qkv_bias, ranks[1])
        self.v = Projection(d, m.kv_heads * m.head_dim, m.qkv_bias, ranks[2])
        self.o = Projection(m.heads * m.head_dim, d, m.o_bias, ranks[3])
        if m.qk_norm == "head":
            self.q_norm = RmsNorm(m.head_dim, m.qk_norm_eps, axis=2)
            self.k_norm = RmsNorm(m.head_dim, m.qk_norm_eps, axis=2)
        elif m.qk_norm == "full":
            self.q_norm = RmsNorm(m.heads * m.head_dim, m.qk_norm_eps)
            self.k_norm = RmsNorm(m.kv_heads * m.head_dim, m.qk_norm_eps)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        q, k, v = self._heads(self.norm(x), inputs.get("cos"), inputs.get("sin"))
        keys, values = self._update(k, v, inputs)
        y = x + self.o(self._attend(q, keys, values, inputs["mask"]))
        return {"y": y} | ({"k_cache_out": keys, "v_cache_out": values} if self.config.explicit else {})

    def _heads(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project, normalise, clip and rotate: `(1, H, D, T)`, `(1, K, D, T)`, `(1, K, D, T)`."""
        m = self.config.mixer
        q, k, v = self.q(x), self.k(x), self.v(x)
        if m.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if m.clip_qkv is not None:
            q, k, v = (t.clamp(-m.clip_qkv, m.clip_qkv) for t in (q, k, v))
        q = q.reshape(1, m.heads, m.head_dim, -1)
        k = k.reshape(1, m.kv_heads, m.head_dim, -1)
        v = v.reshape(1, m.kv_heads, m.head_dim, -1)
        if m.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = (rotate(t, cos, sin, self.config.rotary, m.head_dim) for t in (q, k))
        return q, k, v

    def _update(self, k: Tensor, v: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The caches `(1, K, D, S)` with this call's tokens written at the slots that `write` names."""
        write, keep = inputs["write"], inputs["keep"]
        if self.config.explicit:
            return inputs["k_cache"] * keep + k @ write, inputs["v_cache"] * keep + v @ write
        return inputs["k_cache"].mul_(keep).add_(k @ write), inputs["v_cache"].mul_(keep).add_(v @ write)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        # Decomposed: the fused operation returns inf and NaN on the engine since OS 26 (executorch issue 15833).
        m, slots = self.config.mixer, self.config.slots
        q = (q * m.scale).transpose(2, 3).reshape(1, m.kv_heads, -1, m.head_dim)  # (1, K, G T, D)
        scores = (q @ keys).reshape(1, m.heads, -1, slots) + mask  # (1, H, T, S)
        weights = torch.softmax(scores, dim=-1).reshape(1, m.kv_heads, -1, slots)  # (1, K, G T, S)
        mixed = (weights @ values.transpose(2, 3)).reshape(1, m.heads, -1, m.head_dim)
        return mixed.transpose(2, 3).reshape(1, m.heads * m.head_dim, 1, -1)
