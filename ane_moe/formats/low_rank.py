"""The strongest directions of a weight, kept apart in fp16 from the remainder that is compressed.

Apple recovers the quality of its compressed server model by adapters beside the weights (its 2025
foundation model report); the split by singular directions is that of SVDQuant (Li et al., 2024).
The decomposition is the randomized one of Halko, Martinsson and Tropp (2011), with a fixed seed.
"""

from dataclasses import dataclass

import numpy as np
import torch

OVERSAMPLED = 8
POWER_ROUNDS = 2


@dataclass(frozen=True)
class LowRank:
    """`into` fp16 `(rank, columns)`, `out` fp16 `(rows, rank)`, and what is left of the weight,
    fp16."""

    into: np.ndarray
    out: np.ndarray
    remainder: np.ndarray


def split_directions(weight: np.ndarray, rank: int, moments: np.ndarray | None = None) -> LowRank:
    """Split fp16 `(rows, columns)` into `out @ into` and a remainder.

    `moments` fp32 `(columns,)`, mean squares of the inputs, say which directions matter to the
    output.
    """
    importance = torch.ones(weight.shape[1]) if moments is None else _importance(moments)
    w = torch.from_numpy(weight).float() * importance
    start = torch.randn(
        weight.shape[1], rank + OVERSAMPLED, generator=torch.Generator().manual_seed(0)
    )
    basis = torch.linalg.qr(w @ start).Q
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(w @ (w.T @ basis)).Q
    u, s, vh = torch.linalg.svd(basis.T @ w, full_matrices=False)
    root = s[:rank].sqrt()
    out, into = (
        ((basis @ u[:, :rank]) * root).half(),
        (root[:, None] * vh[:rank] / importance).half(),
    )
    remainder = torch.from_numpy(weight).float() - out.float() @ into.float()
    return LowRank(into.numpy(), out.numpy(), remainder.half().numpy())


def _importance(moments: np.ndarray) -> torch.Tensor:
    """Square roots of the moments, none vanishing beside the others."""
    root = torch.from_numpy(moments).float().sqrt()
    return root.clamp(min=float(root.mean()) * 1e-2) if bool(root.any()) else torch.ones_like(root)
