"""K-means palettes of fp16 values.

In one dimension nothing iterates over weights: a histogram over the 65,536 fp16 values holds all there is to know. It
is gathered into bins of neighbouring values, each kept with its exact mass and mean, and Lloyd's algorithm ("Least
squares quantization in PCM", 1982) runs on these for all groups at once, starting from repeated bisection. The result
is deterministic.

Shapes: G groups, each with a palette of its own; N values in a group; E entries; V the length of a vector.
"""

from functools import cache

import numpy as np
import torch

CODES = 1 << 16
FEW = 16                    # up to so many entries bins are COARSE, else FINE: many entries go to single outliers too
COARSE, FINE = 8, 4         # neighbouring values in a bin: 0.8 % and 0.4 % of their size
LARGEST = 65504.0
GROUPS_AT_ONCE = 64         # of coarse bins: 8 MB
ITERATIONS = 80
RELAXATION = 0.9            # levels overshoot by this share of a step: Lloyd's steps are small near the optimum
SETTLED = 1e-9              # stop when the energy explained grows by less than this share
VECTOR_ITERATIONS = 25
VECTOR_SAMPLE = 1 << 15     # vectors of a group that its palette is fitted to

# All fp16 values by code; codes count up from 0 for positive values and from 0x8000, downwards, for negative ones.
_VALUES = np.arange(CODES, dtype=np.uint16).view(np.float16)
_FINITE = np.where(np.isfinite(_VALUES), _VALUES, np.float16(0)).astype(np.float32)
_ASCENDING = np.concatenate([np.arange(CODES - 1, CODES // 2 - 1, -1), np.arange(CODES // 2)])
_SORTED = np.where(np.isfinite(_VALUES), _VALUES, np.copysign(np.float16(np.inf), _VALUES))[_ASCENDING].astype("f4")


class _Bins:
    """The 65,536 values in bins of `size` neighbours; everything about bins is in ascending order."""

    def __init__(self, size: int):
        self.count, self.size = CODES // size, size
        self.order = _ASCENDING[::size] // size
        self.values = _FINITE.reshape(-1, size)
        self.edges = _SORTED.reshape(-1, size)[:, -1].astype(np.float64)        # the largest value of each
        highest = np.clip(self.edges, -LARGEST, LARGEST)
        self.starts = np.concatenate([[-LARGEST], highest[:-1]])
        self.widths = highest - self.starts
        self.centres = self.values.mean(1, dtype=np.float64)[self.order]

    def gather(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mass of each bin, and the sum of its values, of the mass of every code."""
        binned = counts.reshape(self.count, self.size)
        sums = np.einsum("ij,ij->i", binned, self.values)
        return (binned @ np.ones(self.size, np.float32))[self.order], sums[self.order]


@cache
def _bins(entries: int) -> _Bins:
    return _Bins(COARSE if entries <= FEW else FINE)


def fit_palettes(groups: np.ndarray, entries: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Palettes fp16 `(G, E)`, ascending, of finite values fp16 `(G, N)`.

    `weights` `(G, N)` or `(N,)` say how much a value's error counts (1 without); a group without any counts evenly. A
    group with no more than E different values gets just these, the last repeated.
    """
    bins, step = _bins(entries), GROUPS_AT_ONCE if entries <= FEW else GROUPS_AT_ONCE * FINE // COARSE
    palettes = np.empty((len(groups), entries), np.float16)
    for first in range(0, len(groups), step):
        part = slice(first, first + step)
        mine = weights if weights is None or weights.ndim == 1 else weights[part]
        palettes[part] = _fit(groups[part], entries, mine, bins)
    return palettes


def assign(groups: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """For values fp16 `(G, N)` the nearest entry of each group's ascending palette `(G, E)`, as uint8 `(G, N)`."""
    indices = np.empty(groups.shape, np.uint8)
    for values, palette, out in zip(groups, palettes, indices, strict=True):
        np.take(_nearest(palette), values.view(np.uint16), out=out, mode="clip")
    return indices


def fit_vectors(groups: np.ndarray, entries: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Palettes of vectors, fp16 `(G, E, V)`, of `(G, N, V)`: Lloyd's algorithm on an even sample of each group.

    `weights` `(G, N)` say how much a vector's error counts.
    """
    palettes = np.empty((len(groups), entries, groups.shape[2]), np.float16)
    for number, group in enumerate(groups):
        step = -(-len(group) // VECTOR_SAMPLE)
        points = torch.from_numpy(group[::step].astype(np.float32))
        mass = torch.ones(len(points)) if weights is None else torch.from_numpy(weights[number, ::step]).float()
        palettes[number] = _lloyd_vectors(points, mass, entries).numpy().astype(np.float16)
    return palettes


def assign_vectors(groups: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """For vectors `(G, N, V)` the nearest entry of each group's palette `(G, E, V)`, as uint8 `(G, N)`."""
    indices = np.empty(groups.shape[:2], np.uint8)
    for values, palette, out in zip(groups, palettes, indices, strict=True):
        entries = torch.from_numpy(palette.astype(np.float32))
        for first in range(0, len(values), VECTOR_SAMPLE):
            points = torch.from_numpy(values[first:first + VECTOR_SAMPLE].astype(np.float32))
            out[first:first + VECTOR_SAMPLE] = _nearest_vectors(points, entries).numpy()
    return indices


def _fit(groups: np.ndarray, entries: int, weights: np.ndarray | None, bins: _Bins) -> np.ndarray:
    palettes = np.empty((len(groups), entries), np.float16)
    masses, sums = np.empty((2, len(groups), bins.count), np.float32)
    several = np.ones(len(groups), bool)
    for number, group in enumerate(groups):
        counts = _histogram(group, weights[number] if weights is not None and weights.ndim > 1 else weights)
        several[number] = np.count_nonzero(counts) > entries
        if several[number]:
            masses[number], sums[number] = bins.gather(counts.astype(np.float32))
        else:
            levels = np.unique(_VALUES[np.flatnonzero(counts)] + np.float16(0))       # -0 is 0
            palettes[number] = np.concatenate([levels, np.full(entries - len(levels), levels[-1])])
    if several.any():
        palettes[several] = _lloyd(masses[several], sums[several], entries, bins)
    return palettes


def _histogram(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Mass of every fp16 code among `values`, `(65536,)`."""
    return np.bincount(values.view(np.uint16), weights if weights is not None and weights.any() else None, CODES)


def _lloyd(masses: np.ndarray, sums: np.ndarray, entries: int, bins: _Bins) -> np.ndarray:
    """Palettes fp16 `(G, E)` of bins `(G, B)`."""
    means = np.where(masses > 0, sums / np.maximum(masses, np.float32(1e-30)), bins.centres.astype(np.float32))
    below = ((0, 0), (1, 0))
    mass_below = np.pad(masses.cumsum(1, dtype=np.float64), below)
    sum_below = np.pad(sums.cumsum(1, dtype=np.float64), below)
    squares_below = np.pad((sums.astype(np.float64) * means).cumsum(1), below)
    levels = _bisected(mass_below, sum_below, squares_below, entries, bins)
    explained = np.full(len(levels), -np.inf)
    for _ in range(ITERATIONS):
        mass, total = (np.diff(below, axis=1) for below in _shares(levels, mass_below, sum_below, bins))
        means = np.divide(total, mass, out=levels.copy(), where=mass > 0)
        now = np.divide(total**2, mass, out=np.zeros_like(mass), where=mass > 0).sum(1)
        if np.all(now - explained <= SETTLED * now):
            break
        explained = np.maximum(explained, now)
        levels = np.sort(means + RELAXATION * (means - levels), axis=1)
    return means.astype(np.float16)


def _bisected(mass_below: np.ndarray, sum_below: np.ndarray, squares_below: np.ndarray, entries: int,
              bins: _Bins) -> np.ndarray:
    """Levels `(G, E)`, ascending: of all clusters the one with the largest error is split at its mean, and so on. At
    the optimum all have about the same error, outliers' clusters too."""
    rows = np.arange(len(mass_below))
    first = np.zeros((len(rows), entries), np.int64)
    last, error, mean = np.full_like(first, bins.count), np.zeros(first.shape), np.zeros(first.shape)

    def measure(where: np.ndarray | int) -> None:
        start, end = first[rows, where], last[rows, where]
        mass, total = mass_below[rows, end] - mass_below[rows, start], sum_below[rows, end] - sum_below[rows, start]
        mean[rows, where] = np.divide(total, mass, out=bins.centres[start.clip(0, bins.count - 1)], where=mass > 0)
        squares = squares_below[rows, end] - squares_below[rows, start]
        error[rows, where] = squares - total * mean[rows, where]

    measure(0)
    for number in range(1, entries):
        worst = error[:, :number].argmax(1)
        cut = np.searchsorted(bins.edges, mean[rows, worst])
        cut = np.clip(cut, first[rows, worst] + 1, np.maximum(last[rows, worst] - 1, first[rows, worst] + 1))
        first[rows, number], last[rows, number] = cut, last[rows, worst]
        last[rows, worst] = cut
        measure(worst)
        measure(number)
    return np.sort(mean, axis=1)


def _shares(levels: np.ndarray, mass_below: np.ndarray, sum_below: np.ndarray,
            bins: _Bins) -> tuple[np.ndarray, np.ndarray]:
    """Mass, and sum of values, below each level's share and below the end, `(G, E + 1)`. A bin that is cut counts as
    evenly filled: whole bins would let the levels stick."""
    rows, middles = np.arange(len(levels))[:, None], (levels[:, :-1] + levels[:, 1:]) / 2
    place = np.searchsorted(bins.edges, middles.ravel()).reshape(middles.shape).clip(0, bins.count - 1)
    width = bins.widths[place]
    part = np.clip((middles - bins.starts[place]) / np.maximum(width, 1e-30), 0, 1)
    mass = mass_below[rows, place + 1] - mass_below[rows, place]
    total = sum_below[rows, place + 1] - sum_below[rows, place]
    first, last = np.zeros((len(levels), 1)), (mass_below[:, -1:], sum_below[:, -1:])
    return (np.hstack([first, mass_below[rows, place] + part * mass, last[0]]),
            np.hstack([first, sum_below[rows, place] + part * (total - mass * (1 - part) * width / 2), last[1]]))


def _nearest(palette: np.ndarray) -> np.ndarray:
    """The entry nearest to every fp16 code, uint8 `(65536,)`."""
    wide = palette.astype(np.float64)
    first = np.searchsorted(_SORTED, ((wide[:-1] + wide[1:]) / 2).astype(np.float32), side="right")
    ascending = np.repeat(np.arange(len(palette), dtype=np.uint8), np.diff(first, prepend=0, append=CODES))
    half = CODES // 2
    return np.concatenate([ascending[half:], ascending[:half][::-1]])


def _lloyd_vectors(points: torch.Tensor, mass: torch.Tensor, entries: int) -> torch.Tensor:
    """Entries `(E, V)` of `points` `(N, V)`, starting from points at even steps along their length and direction."""
    order = torch.argsort(points.sum(1), stable=True)
    levels = points[order[torch.linspace(0, len(points) - 1, entries).long()]].clone()
    weighted = points * mass[:, None]
    for _ in range(VECTOR_ITERATIONS):
        nearest = _nearest_vectors(points, levels)
        totals = torch.zeros_like(levels).index_add_(0, nearest, weighted)
        share = torch.zeros(entries).index_add_(0, nearest, mass)
        empty = share == 0
        levels = torch.where(empty[:, None], levels, totals / share.clamp(min=1e-30)[:, None])
        unused = empty.nonzero()[: len(points), 0]          # they go where the error is largest
        if len(unused):
            error = ((points - levels[nearest]) ** 2).sum(1) * mass
            levels[unused] = points[torch.argsort(error, descending=True, stable=True)[: len(unused)]]
    return levels


def _nearest_vectors(points: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return ((levels**2).sum(1) / 2 - points @ levels.T).argmin(1)
