"""What an operation of an ML Program is in torch: one row each.

A value is a tensor; a constant that only shapes an operation (axes, masks, a padding) is a numpy
array, a str or None. What has several outputs gives a tuple. Nothing is rounded here: what each
operation computes is Core AI's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ane_moe.runtime.interface import NotExecuted

Kernel = Callable[..., Any]
GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
CONVOLUTIONS: dict[int, Kernel] = {3: functional.conv1d, 4: functional.conv2d}


def conv(
    x: Tensor,
    weight: Tensor,
    strides: np.ndarray,
    pad_type: str,
    pad: np.ndarray,
    dilations: np.ndarray,
    groups: np.ndarray,
    bias: Tensor | None = None,
) -> Tensor:
    """A convolution `(N, C, ...)`, padded beforehand where it is."""
    if pad_type not in ("valid", "custom"):
        raise NotExecuted("a padding of convolutions that Core AI's twin lacks", pad_type)
    if pad_type == "custom" and pad.any():
        pairs = pad.reshape(-1, 2)[::-1]  # torch names the last axis first
        x = functional.pad(x, [int(size) for pair in pairs for size in pair])
    stride, spread = tuple(map(int, strides)), tuple(map(int, dilations))
    result: Tensor = CONVOLUTIONS[x.dim()](x, weight, bias, stride, 0, spread, int(groups))
    return result


def slice_by_index(
    x: Tensor,
    begin: np.ndarray,
    end: np.ndarray,
    stride: np.ndarray | None = None,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
    squeeze_mask: np.ndarray | None = None,
) -> Tensor:
    """MIL's slice: a mask says that an axis begins, or ends, where `x` does."""
    places: list[slice | int] = []
    for axis in range(x.dim()):
        first = None if _told(begin_mask, axis) else int(begin[axis])
        if _told(squeeze_mask, axis):
            places.append(int(begin[axis]))
        else:
            last = None if _told(end_mask, axis) else int(end[axis])
            places.append(slice(first, last, 1 if stride is None else int(stride[axis])))
    return x[tuple(places)]


def _told(mask: np.ndarray | None, axis: int) -> bool:
    return mask is not None and bool(mask[axis])


def matmul(
    x: Tensor, y: Tensor, transpose_x: np.ndarray | bool, transpose_y: np.ndarray | bool
) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def concat(values: Sequence[Tensor], axis: np.ndarray, interleave: Any = False) -> Tensor:
    if interleave:
        raise NotExecuted("a concat that Core AI's twin lacks", "interleave")
    return torch.cat(list(values), int(axis))


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


def rsqrt(x: Tensor, epsilon: Any = 1e-12) -> Tensor:
    return torch.rsqrt(x + float(epsilon))


def _reduction(kernel: Kernel) -> Kernel:
    def reduce(x: Tensor, axes: np.ndarray | None = None, keep_dims: Any = False) -> Tensor:
        over = tuple(range(x.dim())) if axes is None else tuple(map(int, axes))
        result: Tensor = kernel(x, over, bool(keep_dims))
        return result

    return reduce


def topk(
    x: Tensor,
    k: np.ndarray,
    axis: np.ndarray,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """In order, also where that is not asked for; of equal elements Core AI takes the first ones,
    as the reference runtime does. Indices are int32, which holds those of any type."""
    count = x.shape[int(axis)] if int(k) == -1 else int(k)
    values, indices = torch.topk(x, count, int(axis), largest=not ascending)
    return (values, indices.to(torch.int32)) if return_indices else (values,)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode not in GELU:
        raise NotExecuted("a form of gelu that Core AI's twin lacks", mode)
    return functional.gelu(x, approximate=GELU[mode])


OPERATIONS: dict[str, Kernel] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x.to({"fp16": torch.float16, "fp32": torch.float32}[dtype]),
    "clip": clip,
    "concat": concat,
    "conv": conv,
    "cos": lambda x: x.cos(),
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "gelu": gelu,
    "identity": lambda x: x.clone(),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + float(epsilon)),
    "log": lambda x, epsilon=1e-45: (x + float(epsilon)).log(),
    "matmul": matmul,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mul": lambda x, y: x * y,
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_max": _reduction(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "reduce_mean": _reduction(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "reduce_min": _reduction(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "reduce_sum": _reduction(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "relu": lambda x: x.relu(),
    "round": lambda x: x.round(),
    "rsqrt": rsqrt,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: functional.silu(x),
    "sin": lambda x: x.sin(),
    "slice_by_index": slice_by_index,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "softplus": lambda x: functional.softplus(x),
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
    "topk": topk,
    "transpose": lambda x, perm: x.permute(tuple(map(int, perm))),
}
