"""Running a function with every intermediate kept, and what its numbers look like."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ane_moe.runtime.interface import Observable


@dataclass(frozen=True)
class Traced:
    """One output of one op. `largest` is the largest finite magnitude."""

    op: str
    name: str
    value: np.ndarray
    largest: float
    nan: int
    inf: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass(frozen=True)
class Trace:
    results: dict[str, np.ndarray]
    values: tuple[Traced, ...]


def trace(function: Observable, inputs: Mapping[str, np.ndarray], state: Any = None) -> Trace:
    """Run once and keep all intermediates, in order. Takes the memory of all of them."""
    values: list[Traced] = []

    def note(op: str, _: str, outputs: Mapping[str, np.ndarray]) -> None:
        values.extend(describe(op, name, value) for name, value in outputs.items())

    return Trace(function.observe(inputs, note, state), tuple(values))


def describe(op: str, name: str, value: np.ndarray) -> Traced:
    if value.dtype.kind != "f":
        largest = float(np.abs(value.astype(np.float64)).max()) if value.size else 0.0
        return Traced(op, name, value, largest, 0, 0)
    nan, inf = int(np.isnan(value).sum()), int(np.isinf(value).sum())
    finite = np.abs(value[np.isfinite(value)] if nan or inf else value)
    return Traced(op, name, value, float(finite.max()) if finite.size else 0.0, nan, inf)
