"""K-means palettes of fp16 values.

In one dimension nothing iterates over weights: a histogram over fp16 values holds all there is to
know. Its bins hold some neighbouring values each, with their exact mass and sum, and all groups are
treated at once. Repeated bisection gives the first levels; Newton's method moves them to where
every level is the mean of its cell, Lloyd's condition ("Least squares quantization in PCM", 1982):
a level depends on its neighbours alone, so a step is one tridiagonal system. The result is
deterministic, and a local optimum.

Shapes: G groups, each with a palette of its own; N values in a group; E entries.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

from ane_moe.half import from_half

CODES = 1 << 16
FEW = 16  # up to so many entries bins are COARSE, else FINE: many entries go to single outliers too
COARSE, FINE = 4, 2  # 16 or 4 neighbouring values in a bin: 1.6 % and 0.4 % of their size
LARGEST = 65504.0
ONE = 2.0**24  # of a count, above the sum of steps of a group of up to CODES values
GROUPS_AT_ONCE = 64  # of coarse bins: 4 MB
CHUNK = 1 << 18
ITERATIONS = 40
NEARBY = 4  # bins to either side over which a density is taken
STIFFEST = 0.95  # see _newton_step
SPLIT_AT_ONCE = 4  # of so many clusters one is split at a time
SETTLED = 1e-4  # stop when the error changes by less than this share

# All fp16 values by code; codes count up from 0 for positive values and from 0x8000, downwards, for
# negative ones.
_VALUES = np.arange(CODES, dtype=np.uint16).view(np.float16)
_FINITE = np.where(np.isfinite(_VALUES), _VALUES, np.float16(0))
_ASCENDING = np.concatenate([np.arange(CODES - 1, CODES // 2 - 1, -1), np.arange(CODES // 2)])
_SORTED = np.where(np.isfinite(_VALUES), _VALUES, np.copysign(np.float16(np.inf), _VALUES))[
    _ASCENDING
].astype("f4")


class _Bins:
    """The 65,536 values in bins of `1 << shift` neighbours; `ascending` orders these, as `starts`
    and `ends` are. The values of a bin are its `first` one and so many times `step` more."""

    def __init__(self, shift: int):
        self.shift, self.count = shift, CODES >> shift
        self.first = _FINITE[:: 1 << shift].astype(np.float64)
        self.step = _FINITE[1 :: 1 << shift] - self.first
        self.ascending = _ASCENDING[:: 1 << shift] >> shift
        self.ends = np.clip(
            _SORTED[(1 << shift) - 1 :: 1 << shift].astype(np.float64), -LARGEST, LARGEST
        )
        self.starts = np.concatenate([[-LARGEST], self.ends[:-1]])

    def gather(
        self, values: np.ndarray, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mass of each bin, and the sum of its values, of fp16 `(N,)`; bins are in the order of the
        codes."""
        if len(values) > CODES:  # each code once is less to gather
            values, weights = _FINITE, _counts(values, weights)
        codes = values.view(np.uint16)
        bins = (codes >> self.shift).astype(np.intp)
        if weights is not None:
            wide = from_half(values).astype(np.float64)
            mass = np.bincount(bins, weights, self.count)
            return mass, np.bincount(bins, wide * weights, self.count)
        # Values and steps counted at once: whole numbers, so that no sum is rounded.
        steps = (codes & ((1 << self.shift) - 1)).astype(np.float64)
        steps += ONE
        mass, steps = np.divmod(np.bincount(bins, steps, self.count), ONE)
        return mass, mass * self.first + steps * self.step + 0.0


@cache
def _bins(entries: int) -> _Bins:
    return _Bins(COARSE if entries <= FEW else FINE)


def fit_palettes(groups: np.ndarray, entries: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Palettes fp16 `(G, E)`, ascending, of finite values fp16 `(G, N)`.

    `weights` `(G, N)` or `(N,)` say how much a value's error counts (1 without); a group without
    any counts evenly. A group with no more than E different values gets just these, the last
    repeated.
    """
    bins, step = (
        _bins(entries),
        GROUPS_AT_ONCE if entries <= FEW else GROUPS_AT_ONCE * FINE // COARSE,
    )
    palettes = np.empty((len(groups), entries), np.float16)
    for first in range(0, len(groups), step):
        part = slice(first, first + step)
        mine = weights if weights is None or weights.ndim == 1 else weights[part]
        # A step between subnormal numbers may change the order of neighbours.
        palettes[part] = np.sort(_fit(groups[part], entries, mine, bins), axis=1)
    return palettes


def assign(groups: np.ndarray, palettes: np.ndarray) -> np.ndarray:
    """For values fp16 `(G, N)` the nearest entry of each group's ascending palette `(G, E)`, as
    uint8 `(G, N)`."""
    indices = np.empty(groups.shape, np.uint8)
    for values, palette, out in zip(groups, palettes, indices, strict=True):
        nearest = _nearest(palette)
        for part in _chunks(len(values)):
            np.take(nearest, values[part].view(np.uint16), out=out[part], mode="clip")
    return indices


def _counts(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Mass of every fp16 code among `values`, `(65536,)`."""
    counts = np.zeros(CODES)
    for part in _chunks(len(values)):
        counts += np.bincount(
            values[part].view(np.uint16), None if weights is None else weights[part], CODES
        )
    return counts


def _chunks(count: int) -> Iterator[slice]:
    """Of an array: numpy makes 64-bit indices of what it counts and looks up, which then stay in
    the cache."""
    return (slice(first, first + CHUNK) for first in range(0, count, CHUNK))


def _fit(groups: np.ndarray, entries: int, weights: np.ndarray | None, bins: _Bins) -> np.ndarray:
    palettes = np.empty((len(groups), entries), np.float16)
    masses, sums = np.empty((2, len(groups), bins.count))
    several = np.ones(len(groups), bool)
    for number, group in enumerate(groups):
        mine = weights[number] if weights is not None and weights.ndim > 1 else weights
        mine = mine if mine is not None and mine.any() else None
        masses[number], sums[number] = bins.gather(group, mine)
        if np.count_nonzero(masses[number]) <= entries:
            # Adding 0 makes -0 one with 0.
            levels = np.unique(_VALUES[np.flatnonzero(_counts(group, mine))] + np.float16(0))
            several[number] = len(levels) > entries
            if not several[number]:
                palettes[number] = np.concatenate(
                    [levels, np.full(entries - len(levels), levels[-1])]
                )
    if several.any():
        palettes[several] = _Histograms(masses[several], sums[several], bins).fit(entries)
    return palettes


class _Histograms:
    """Of G groups, over the bins that hold anything: mass, sum of values and of squares below each
    bin `(G, B + 1)`."""

    def __init__(self, masses: np.ndarray, sums: np.ndarray, bins: _Bins):
        used = np.any(masses, axis=0, keepdims=True)[0, bins.ascending]
        masses, sums = (of[:, bins.ascending[used]] for of in (masses, sums))
        self.starts, self.ends = bins.starts[used], bins.ends[used]
        self.rows = np.arange(len(masses))[:, None]
        squares = np.divide(sums**2, masses, out=np.zeros_like(sums), where=masses > 0)
        self.mass, self.sum, self.squares = (
            np.pad(np.cumsum(part, 1), ((0, 0), (1, 0))) for part in (masses, sums, squares)
        )

    def fit(self, entries: int) -> np.ndarray:
        """Palettes fp16 `(G, E)`, ascending: levels that are the means of what is nearest to them.

        A Newton step that makes things worse is tried again, nearer to Lloyd's own, which never
        does.
        """
        levels = self._bisected(entries)
        best, lloyd, newton = levels, np.zeros_like(levels), np.zeros_like(levels)
        most, trust = np.full((len(levels), 1), -np.inf), np.ones((len(levels), 1))
        for _ in range(ITERATIONS):
            borders = (levels[:, :-1] + levels[:, 1:]) / 2
            mass, total, density = self._cells(borders)
            means = np.divide(total, mass, out=levels.copy(), where=mass > 0)
            explained = (total * means).sum(1, keepdims=True)
            change = np.abs(explained - most) / np.maximum(self.squares[:, -1:] - explained, 1e-30)
            better = explained >= most
            most, trust = (
                np.maximum(explained, most),
                np.where(better, np.minimum(2 * trust, 1), trust / 4),
            )
            best, lloyd = np.where(better, levels, best), np.where(better, means - levels, lloyd)
            if change.mean() <= SETTLED:
                break
            newton = np.where(better, _newton_step(levels, borders, means, mass, density), newton)
            levels = np.sort(best + trust * newton + (1 - trust) * lloyd, axis=1)
        return (best + lloyd).astype(np.float16)

    def _cells(self, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mass and sum of values between `borders` `(G, E - 1)`, each `(G, E)`, and the density at
        them. A bin that is cut counts as evenly filled: whole bins would let the levels stick."""
        count = len(self.ends)
        place = (
            np.searchsorted(self.ends, borders.ravel()).reshape(borders.shape).clip(0, count - 1)
        )
        start, width = self.starts[place], self.ends[place] - self.starts[place]
        part = np.clip((borders - start) / width, 0, 1)
        mass, total = self.mass[self.rows, place], self.sum[self.rows, place]
        mine = self.mass[self.rows, place + 1] - mass
        sums = self.sum[self.rows, place + 1] - total
        below = (mass + part * mine, total + part * (sums - mine * (1 - part) * width / 2))
        low, high = (place - NEARBY).clip(0), (place + NEARBY).clip(None, count - 1)
        density = self.mass[self.rows, high + 1] - self.mass[self.rows, low]
        density /= self.ends[high] - self.starts[low]
        return self._between(below[0], self.mass), self._between(below[1], self.sum), density

    def _between(self, below: np.ndarray, of: np.ndarray) -> np.ndarray:
        """What lies in each cell, of what lies below each border and in all."""
        return np.diff(np.hstack([np.zeros_like(self.rows), below, of[:, -1:]]), axis=1)

    def _bisected(self, entries: int) -> np.ndarray:
        """Levels `(G, E)`, ascending: of all clusters the one with the largest error is split at
        its mean, and so on. At the optimum all have about the same error, outliers' clusters
        too."""
        first = np.zeros((len(self.rows), entries), np.int64)
        last, error, mean = (
            np.full_like(first, len(self.ends)),
            np.zeros(first.shape),
            np.zeros(first.shape),
        )

        def measure(where: np.ndarray) -> None:
            start, end = first[self.rows, where], last[self.rows, where]
            mass, total = (
                of[self.rows, end] - of[self.rows, start] for of in (self.mass, self.sum)
            )
            middle = self.ends[start.clip(0, len(self.ends) - 1)]
            mean[self.rows, where] = middle = np.divide(total, mass, out=middle, where=mass > 0)
            error[self.rows, where] = (
                self.squares[self.rows, end] - self.squares[self.rows, start] - total * middle
            )

        number = 1
        measure(np.zeros_like(self.rows))
        while number < entries:
            more = min(max(1, number // SPLIT_AT_ONCE), entries - number)
            worst = np.argpartition(error[:, :number], number - more, axis=1)[:, number - more :]
            fresh = np.broadcast_to(np.arange(number, number + more), worst.shape)
            start, end = first[self.rows, worst], last[self.rows, worst]
            cut = np.searchsorted(self.ends, mean[self.rows, worst].ravel()).reshape(worst.shape)
            cut = np.clip(cut, start + 1, np.maximum(end - 1, start + 1)).clip(None, len(self.ends))
            first[self.rows, fresh], last[self.rows, fresh], last[self.rows, worst] = cut, end, cut
            measure(worst)
            measure(fresh)
            number += more
        return np.sort(mean, axis=1)


def _newton_step(
    levels: np.ndarray,
    borders: np.ndarray,
    means: np.ndarray,
    mass: np.ndarray,
    density: np.ndarray,
) -> np.ndarray:
    """The step `(G, E)` to where every level would be its cell's mean, were the densities at the
    borders constant.

    A border that moves by 1 moves the means beside it by density * distance / mass. These sums are
    kept below 1, where a density is not concave: then the system has a solution, of at most 1 / (1
    - STIFFEST) Lloyd steps.
    """
    from scipy.linalg.lapack import dgtsv  # takes longer to import than a plan to print

    nothing, thin = np.zeros((len(levels), 1)), np.maximum(mass, 1e-30)
    left = np.hstack([nothing, density * (means[:, 1:] - borders)]) / thin
    right = np.hstack([density * (borders - means[:, :-1]), nothing]) / thin
    scale = STIFFEST / np.maximum(left + right, STIFFEST) / 2
    left, right = left * scale, right * scale
    lower, upper = -left.ravel()[1:], -right.ravel()[:-1]
    return dgtsv(lower, 1 - (left + right).ravel(), upper, (means - levels).ravel())[3].reshape(
        levels.shape
    )


def _nearest(palette: np.ndarray) -> np.ndarray:
    """The entry nearest to every fp16 code, uint8 `(65536,)`."""
    wide, half = palette.astype(np.float64), CODES // 2
    ends = [
        *np.searchsorted(
            _SORTED, ((wide[:-1] + wide[1:]) / 2).astype(np.float32), side="right"
        ).tolist(),
        CODES,
    ]
    nearest, start = np.empty(CODES, np.uint8), 0
    for entry, end in enumerate(ends):  # negative codes count down, positive ones up
        if start < half:
            nearest[CODES - min(end, half) : CODES - start] = entry
        if end > half:
            nearest[max(start, half) - half : end - half] = entry
        start = end
    return nearest
