"""Adapters that nobody fitted: drawn, so that none of them can be left out unnoticed."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ane_moe.early_adapters import Adapter, Adapters, write_adapters

RANK = 3


def drawn_adapters(d_model: int, layers: Iterable[int], ahead: int, seed: int = 0) -> Adapters:
    """One of each of these layers, whose part in what it gives is as large as the state's own."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.normal(size=(rows, columns)) / RANK**0.5).astype(np.float32)

    def adapter() -> Adapter:
        return Adapter(matrix(d_model, RANK) * d_model**-0.5 * RANK**0.5, matrix(RANK, d_model))

    return Adapters(d_model, {(layer, ahead): adapter() for layer in layers})


def drawn_file(path: Path, d_model: int, layers: Iterable[int], ahead: int, seed: int = 0) -> Path:
    """The same as a file of `ane-moe align`."""
    write_adapters(drawn_adapters(d_model, layers, ahead, seed), path)
    return path
