"""Hypothesis strategies for tensors: small ranks, size-1 and empty dimensions, four dtypes."""

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

QUICK = settings(deadline=None, max_examples=40, derandomize=True)

FLOATS = (np.float16, np.float32)
NUMBERS = (np.float16, np.float32, np.int32)


def shapes(
    low: int = 1, high: int = 4, smallest: int = 1, largest: int = 5
) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(smallest, largest), min_size=low, max_size=high).map(tuple)


def values(shape: tuple[int, ...], dtype: Any, seed: int, scale: float = 2.0) -> np.ndarray:
    """Random numbers of a shape: normal for floats, small integers, coin tosses for bool."""
    rng = np.random.default_rng(seed)
    if dtype is np.bool_:
        return rng.random(shape) < 0.5
    if np.issubdtype(dtype, np.integer):
        low = 0 if np.issubdtype(dtype, np.unsignedinteger) else -9
        return np.asarray(rng.integers(low, 10, shape), dtype)
    return np.asarray(rng.standard_normal(shape) * scale, dtype)


@st.composite
def tensors(
    draw: st.DrawFn,
    dtypes: tuple = FLOATS,
    low: int = 1,
    high: int = 4,
    smallest: int = 1,
    largest: int = 5,
) -> np.ndarray:
    shape = draw(shapes(low, high, smallest, largest))
    return values(shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16)))


@st.composite
def broadcast_pairs(
    draw: st.DrawFn, dtypes: tuple = NUMBERS, smallest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Two tensors whose shapes broadcast: some dimensions 1, some missing in front."""
    full = draw(shapes(1, 4, smallest, 4))
    dtype = draw(st.sampled_from(dtypes))
    sides = []
    for _ in range(2):
        shape = tuple(1 if draw(st.booleans()) and size else size for size in full)
        sides.append(shape[draw(st.integers(0, len(shape) - 1)) :])
    return tuple(values(shape, dtype, draw(st.integers(0, 2**16))) for shape in sides)  # type: ignore[return-value]


@st.composite
def tensor_and_axes(
    draw: st.DrawFn, dtypes: tuple = FLOATS, smallest: int = 1
) -> tuple[np.ndarray, list[int]]:
    """A tensor and a set of its axes, some of them counted from the end."""
    x = draw(tensors(dtypes, smallest=smallest))
    axes = draw(st.lists(st.integers(0, x.ndim - 1), min_size=1, max_size=x.ndim, unique=True))
    return x, [axis - x.ndim if draw(st.booleans()) else axis for axis in axes]


@st.composite
def tensor_and_axis(
    draw: st.DrawFn, dtypes: tuple = FLOATS, smallest: int = 1
) -> tuple[np.ndarray, int]:
    x, axes = draw(tensor_and_axes(dtypes, smallest))
    return x, axes[0]
