"""Palettes whose entries stand for several weights at once.

Shapes: G groups, each with a palette of its own; N vectors in a group; E entries; V the length of a
vector.
"""

import numpy as np
import torch

VECTOR_ITERATIONS = 25
VECTOR_SAMPLE = 1 << 15  # vectors of a group that its palette is fitted to


def fit_vectors(groups: np.ndarray, entries: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Palettes of vectors, fp16 `(G, E, V)`, of `(G, N, V)`: Lloyd's algorithm on an even sample of
    each group.

    `weights` `(G, N)` say how much a vector's error counts.
    """
    palettes = np.empty((len(groups), entries, groups.shape[2]), np.float16)
    for number, group in enumerate(groups):
        step = -(-len(group) // VECTOR_SAMPLE)
        points = torch.from_numpy(group[::step].astype(np.float32))
        mass = (
            torch.ones(len(points))
            if weights is None
            else torch.from_numpy(weights[number, ::step]).float()
        )
        palettes[number] = _lloyd_vectors(points, mass, entries).numpy().astype(np.float16)
    return palettes


def assign_vectors(groups: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """For vectors `(G, N, V)` the nearest entry of each group's palette `(G, E, V)`, as uint8 `(G,
    N)`."""
    indices = np.empty(groups.shape[:2], np.uint8)
    for values, palette, out in zip(groups, palettes, indices, strict=True):
        entries = torch.from_numpy(palette.astype(np.float32))
        for first in range(0, len(values), VECTOR_SAMPLE):
            points = torch.from_numpy(values[first : first + VECTOR_SAMPLE].astype(np.float32))
            out[first : first + VECTOR_SAMPLE] = _nearest_vectors(points, entries).numpy()
    return indices


def _lloyd_vectors(points: torch.Tensor, mass: torch.Tensor, entries: int) -> torch.Tensor:
    """Entries `(E, V)` of `points` `(N, V)`, starting from points at even steps along their length
    and direction."""
    order = torch.argsort(points.sum(1), stable=True)
    levels = points[order[torch.linspace(0, len(points) - 1, entries).long()]].clone()
    weighted = points * mass[:, None]
    for _ in range(VECTOR_ITERATIONS):
        nearest = _nearest_vectors(points, levels)
        totals = torch.zeros_like(levels).index_add_(0, nearest, weighted)
        share = torch.zeros(entries).index_add_(0, nearest, mass)
        empty = share == 0
        levels = torch.where(empty[:, None], levels, totals / share.clamp(min=1e-30)[:, None])
        unused = empty.nonzero()[: len(points), 0]  # they go where the error is largest
        if len(unused):
            error = ((points - levels[nearest]) ** 2).sum(1) * mass
            levels[unused] = points[
                torch.argsort(error, descending=True, stable=True)[: len(unused)]
            ]
    return levels


def _nearest_vectors(points: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return ((levels**2).sum(1) / 2 - points @ levels.T).argmin(1)
