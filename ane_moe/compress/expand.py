"""An encoded weight turned back into numbers, by the reference runtime's own operations."""

import numpy as np
import torch

from ane_moe.compress.encoded import Encoded, Stored
from ane_moe.runtime.weight_values import OPS


def expand(encoded: Encoded) -> np.ndarray:
    """The fp16 matrix `(rows, columns)` that a runtime makes of an encoded weight."""
    made: list[tuple[torch.Tensor, ...]] = []
    for expansion in encoded.expansions:
        op = OPS[expansion.type]
        arguments = [_tensor(expansion.inputs.get(name.rstrip("?")), made) for name in op.tensors.split()]
        result = op.make(**expansion.integers)(*arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        made.append(tuple(value.half() if value.is_floating_point() else value for value in outputs))
    dense = made[-1][-1]
    return dense.reshape(dense.shape[:2]).numpy()


def _tensor(value: Stored | tuple[int, int] | None, made: list[tuple[torch.Tensor, ...]]) -> torch.Tensor | None:
    if isinstance(value, Stored):
        return torch.from_numpy(np.ascontiguousarray(value.values))
    return None if value is None else made[value[0]][value[1]]
