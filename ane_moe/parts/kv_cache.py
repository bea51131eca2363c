"""Attention over a KV cache that is written by mask, as grouped-query mixers share it."""

import torch
from torch import Tensor

from ane_moe.model.port import Port, Shape


def cache_states(kv_heads: int, head_dim: int, slots: int) -> tuple[Port, ...]:
    """The caches of a layer's keys and values, `(1, K, D, S)`."""
    shape: Shape = (1, kv_heads, head_dim, slots)
    return tuple(Port(name, shape, f"state.{{0}}.{name}") for name in ("k_cache", "v_cache"))


def cache_ports(
    rope: str | None, rotary: int, window: int | None, slots: int, tokens: int
) -> tuple[Port, ...]:
    """What attention over a cache asks of the host: rotary rows, what may be seen, where to
    write."""
    row = (1, 1, tokens, slots)
    rows = (
        Port(name, (1, 1, rotary, tokens), f"rope.{rope}.{name}")
        for name in ("cos", "sin")
        if rotary
    )
    return (
        *rows,
        Port("mask", row, f"mask.{window or 'all'}"),
        Port("write", row, "write"),
        Port("keep", (1, 1, 1, slots), "keep"),
    )


def updated(name: str, new: Tensor, inputs: dict[str, Tensor], explicit: bool) -> Tensor:
    """The cache `(1, K, D, S)` with this call's tokens `(1, K, D, T)` at the slots that `write`
    names.

    `write` holds one one-hot row per token and `keep` the untouched slots, so that the cache is
    rewritten by products and sums: slices at run-time offsets leave the engine.
    """
    cache, write, keep = inputs[name], inputs["write"], inputs["keep"]
    if explicit:
        return cache * keep + new @ write
    return cache.mul_(keep).add_(new @ write)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Queries `(1, H, D, T)` over caches `(1, K, D, S)`: `(1, H D, 1, T)`.

    A group's query heads are folded into the token axis, which keeps every product at rank 4
    without repeating keys and values. Decomposed: the fused operation returns inf and NaN on the
    engine since OS 26 (executorch issue 15833).
    """
    heads, head_dim = q.shape[1], q.shape[2]
    kv_heads, slots = keys.shape[1], keys.shape[3]
    q = (q * scale).transpose(2, 3).reshape(1, kv_heads, -1, head_dim)  # (1, K, G T, D)
    scores = (q @ keys).reshape(1, heads, -1, slots) + mask  # (1, H, T, S)
    weights = torch.softmax(scores, dim=-1).reshape(1, kv_heads, -1, slots)  # (1, K, G T, S)
    mixed = (weights @ values.transpose(2, 3)).reshape(1, heads, -1, head_dim)
    return mixed.transpose(2, 3).reshape(1, heads * head_dim, 1, -1)
