"""The strongest directions of a weight, kept apart in fp16 from the remainder that is compressed.

Apple recovers the quality of its compressed server model by adapters beside the weights (its 2025
foundation model report); the split by singular directions is that of SVDQuant (Li et al., 2024).
The decomposition is the randomized one of Halko, Martinsson and Tropp (2011), with a fixed seed. It
is done in fp64: processors differ in the last bits of it, which rounding to fp16 takes away.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

OVERSAMPLED = 8
POWER_ROUNDS = 2
BLOCK = 1 << 20  # elements of a weight that are fp64 at a time


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
    columns = weight.shape[1]
    importance = torch.ones(columns).double() if moments is None else _importance(moments)
    scaled = _Scaled(weight, importance)
    # Normal numbers of numpy: those of torch depend on the processor.
    start = np.random.default_rng(0).standard_normal((columns, rank + OVERSAMPLED))
    basis = torch.linalg.qr(scaled.times(torch.from_numpy(start))).Q
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(scaled.times(scaled.transposed_times(basis))).Q
    u, s, vh = torch.linalg.svd(scaled.transposed_times(basis).T, full_matrices=False)
    root = s[:rank].sqrt() * _signs(vh[:rank])
    out = ((basis @ u[:, :rank]) * root).half()
    into = (root[:, None] * vh[:rank] / importance).half()
    return LowRank(into.numpy(), out.numpy(), _remainder(weight, out, into))


@dataclass(frozen=True)
class _Scaled:
    """A weight fp16 `(rows, columns)`, whose columns are multiplied by the `importance` of what
    enters them, fp64 `(columns,)`."""

    weight: np.ndarray
    importance: torch.Tensor

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """The product with `(columns, n)`, `(rows, n)`."""
        return torch.cat([self._block(rows) @ right for rows in _blocks(self.weight)])

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """The product of its transpose with `(rows, n)`, `(columns, n)`."""
        total = torch.zeros(self.weight.shape[1], left.shape[1], dtype=torch.float64)
        for rows in _blocks(self.weight):
            total += self._block(rows).T @ left[rows]
        return total

    def _block(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self.weight[rows]).double() * self.importance


def _blocks(weight: np.ndarray) -> Iterator[slice]:
    rows, columns = weight.shape
    step = max(1, BLOCK // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def _signs(vectors: torch.Tensor) -> torch.Tensor:
    """What makes the largest number of each of the `(rank, columns)` positive: a decomposition
    leaves the signs of its vectors open. `(rank,)`"""
    largest = vectors.abs().argmax(1, keepdim=True)
    return vectors.gather(1, largest)[:, 0].sign()


def _remainder(weight: np.ndarray, out: torch.Tensor, into: torch.Tensor) -> np.ndarray:
    left = np.empty_like(weight)
    for rows in _blocks(weight):
        product = out[rows].double() @ into.double()
        left[rows] = (torch.from_numpy(weight[rows]).double() - product).half().numpy()
    return left


def _importance(moments: np.ndarray) -> torch.Tensor:
    """Square roots of the moments, none vanishing beside the others."""
    root = torch.from_numpy(moments).double().sqrt()
    return root.clamp(min=float(root.mean()) * 1e-2) if bool(root.any()) else torch.ones_like(root)
