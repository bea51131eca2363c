"""Rotary position embedding, half-split form."""

import torch
from torch import Tensor


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, pairs: int, head_dim: int) -> Tensor:
    """Rotate the first `2 pairs` channels of each head: heads `(1, H, D, T)`, cos and sin `(1, 1,
    pairs, T)`.

    Slices lie on the channel axis: at a non-zero offset of the last axis the M1 and M2 engines
    saturate at 4094.
    """
    a, b = heads[:, :, :pairs], heads[:, :, pairs : 2 * pairs]
    rest = [heads[:, :, 2 * pairs :]] if 2 * pairs < head_dim else []
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], dim=2)  # (1, H, D, T)
