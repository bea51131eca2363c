"""An encoded weight turned back into numbers, by the reference runtime's own operations."""

import numpy as np
import torch

from ane_moe.formats.encoded import Encoded, Stored
from ane_moe.runtime.reference.weight_values import run_constexpr


def expand(encoded: Encoded) -> np.ndarray:
    """The fp16 matrix `(rows, columns)` that a runtime makes of an encoded weight."""
    made: list[tuple[torch.Tensor, ...]] = []
    for expansion in encoded.expansions:
        tensors = {name: _tensor(value, made) for name, value in expansion.inputs.items()}
        made.append(run_constexpr(expansion.type, tensors, expansion.integers))
    dense = made[-1][-1]
    return dense.reshape(dense.shape[:2]).numpy()


def _tensor(value: Stored | tuple[int, int], made: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    if isinstance(value, Stored):
        return torch.from_numpy(np.array(value.values))  # it may be a view of a file
    return made[value[0]][value[1]]
