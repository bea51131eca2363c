"""How each declared dtype is held in memory: in torch inside, in numpy at the edges."""

import numpy as np
import torch

from ane_moe.errors import UserError
from ane_moe.runtime.numpy_dtypes import NUMPY

# Held in a wider type where torch has few kernels for the declared one (uint16, uint32), or none
# (sub-byte).
TORCH: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "bool": torch.bool,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
}


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype a value declared `dtype` is computed and stored in. Raises UserError for strings
    and the like."""
    if dtype not in TORCH:
        raise UserError("a tensor has an element type that cannot be computed with", found=dtype)
    return TORCH[dtype]


def to_torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    """`array` as a tensor of its own memory, in the form `dtype` is held in."""
    own = np.array(array, order="C", dtype=None if array.dtype != np.uint64 else np.int64)
    return torch.from_numpy(own).to(torch_dtype(dtype))


def to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """`tensor` as the numpy array a caller expects of `dtype`; shares memory where it can."""
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy().astype(NUMPY[dtype], copy=False)
