"""Attention over a KV cache that is written by mask, as grouped-query mixers share it."""

import torch
from torch import Tensor


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


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Queries `(1, H, D, T)` over caches `(1, K, D, S)`: `(1, H D, 1, T)`, or of values of another
    `width` V, `(1, K, V, S)`: `(1, H V, 1, T)`. `sinks`, `(1, H, T, 1)`, are scores of no key: of
    the weights, their share goes nowhere.

    A group's query heads are folded into the token axis, which keeps every product at rank 4
    without repeating keys and values. Decomposed: the fused operation returns inf and NaN on the
    engine since OS 26 (executorch issue 15833).
    """
    heads, head_dim = q.shape[1], q.shape[2]
    kv_heads, slots = keys.shape[1], keys.shape[3]
    q = (q * scale).transpose(2, 3).reshape(1, kv_heads, -1, head_dim)  # (1, K, G T, D)
    scores = (q @ keys).reshape(1, heads, -1, slots) + mask  # (1, H, T, S)
    weights = _softmax(scores, sinks).reshape(1, kv_heads, -1, slots)  # (1, K, G T, S)
    width = width or head_dim
    mixed = (weights @ values.transpose(2, 3)).reshape(1, heads, -1, width)
    return mixed.transpose(2, 3).reshape(1, heads * width, 1, -1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the scores, and sinks where there are any, whose own column is left out: it comes last,
    since slices at a non-zero offset of the last axis saturate on the M1 and M2 engines."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[:, :, :, :-1]
