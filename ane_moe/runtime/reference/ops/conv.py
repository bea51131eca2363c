"""Convolutions of one to three spatial dimensions."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from ane_moe.runtime.reference.ops.arithmetic import RUN, Arithmetic, Exact
from ane_moe.runtime.reference.ops.table import Kernel, Op
from ane_moe.runtime.reference.stored_matrix import StoredMatrix

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def spatial_padding(
    pad_type: str,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """(before, after) per spatial dimension.

    `same` gives ceil(size / stride) outputs, the odd element of padding after the data;
    `same_lower` puts it before.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        flat = pad if pad is not None else [0] * (2 * len(sizes))
        return [(before, after) for before, after in zip(flat[::2], flat[1::2], strict=True)]
    pairs = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        less, more = total // 2, total - total // 2
        pairs.append((more, less) if pad_type == "same_lower" else (less, more))
    return pairs


def pad_spatial(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with `value` around its last `len(pairs)` dimensions."""
    if not any(before or after for before, after in pairs):
        return x
    return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=value)


def _pointwise(arith: Arithmetic, x: Tensor, weight: Tensor | StoredMatrix) -> Tensor:
    """A convolution with kernel size 1: a plain product, which is no slower at one position and
    faster at many."""
    columns = x.reshape(x.shape[1], -1) if x.shape[0] == 1 else x.flatten(2)
    if isinstance(weight, StoredMatrix):
        y = weight.times(columns)
    else:
        y = arith.matmul(weight.reshape(weight.shape[0], -1), columns)
    return y.reshape(x.shape[0], weight.shape[0], *x.shape[2:])


def _has_unit_steps(strides: list[int] | None = None, groups: int = 1, **_: object) -> bool:
    """Whether a convolution with kernel size 1 is a plain product."""
    return groups == 1 and all(stride == 1 for stride in strides or ())


def _in_runs(
    arith: Arithmetic,
    x: Tensor,
    weight: Tensor,
    strides: list[int],
    dilations: list[int],
    groups: int,
) -> Tensor:
    """The convolution as a rounded sum over runs of input channels."""
    per_group = weight.shape[1]
    step = max(1, RUN // max(1, math.prod(weight.shape[2:])))
    grouped = x.reshape(x.shape[0], groups, per_group, *x.shape[2:])
    total = None
    for start, stop in pairwise([*range(0, per_group, step), per_group]):
        part = grouped[:, :, start:stop].flatten(1, 2)
        y = arith.round(
            CONV[x.dim()](part, weight[:, start:stop], None, strides, 0, dilations, groups)
        )
        total = y if total is None else arith.round(total + y)
    assert total is not None
    return total


def _conv(
    arith: Arithmetic,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Kernel:
    unit_steps = _has_unit_steps(strides, groups)
    bare = not any(pad or ())  # with kernel size 1 only named padding adds anything

    def kernel(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None) -> Tensor:
        if bias is None and bare and isinstance(weight, StoredMatrix):
            return _pointwise(arith, x, weight)
        ones = [1] * (x.dim() - 2)
        size = ones if isinstance(weight, StoredMatrix) else weight.shape[2:]
        stride, dilation = strides or ones, dilations or ones
        x = pad_spatial(x, spatial_padding(pad_type, pad, x.shape[2:], size, stride, dilation))
        if isinstance(weight, StoredMatrix) or (unit_steps and all(k == 1 for k in size)):
            y = _pointwise(arith, x, weight)
        elif isinstance(arith, Exact):
            return CONV[x.dim()](x, weight, bias, stride, 0, dilation, groups)
        else:
            y = _in_runs(arith, x, weight, stride, dilation, groups)
        return y if bias is None else arith.round(y) + bias.reshape(-1, *ones)

    return kernel


def _conv_transpose(
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
    output_shape: list[int] | None = None,
) -> Kernel:
    """The full transposed convolution, then a crop.

    `same` keeps size * stride elements; `output_shape` keeps that many. The surplus is cropped
    evenly, the odd element after the data.
    """

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ones = [1] * (x.dim() - 2)
        stride = strides or ones
        full = CONV_TRANSPOSE[x.dim()](x, weight, bias, stride, 0, 0, groups, dilations or ones)
        wanted = (
            [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
            if pad_type == "same"
            else None
        )
        flat = pad if pad_type == "custom" and pad is not None else [0] * (2 * len(ones))
        if output_shape is not None:
            wanted = list(output_shape[2:])
        for axis in range(len(ones)):
            before, after = flat[2 * axis], flat[2 * axis + 1]
            size = full.shape[axis + 2] - before - after
            if wanted is not None:
                before, size = before + max(0, size - wanted[axis]) // 2, wanted[axis]
            missing = before + size - full.shape[axis + 2]
            if missing > 0:
                room = [(0, 0)] * len(ones)
                room[axis] = (0, missing)
                full = pad_spatial(full, room)
            full = full.narrow(axis + 2, before, size)
        return full

    return kernel


def _conv_quantized(
    arith: Arithmetic,
    quantization_type: str,
    nbits: int = 8,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Kernel:
    """Weights are `quantized * scale + bias`, scale and bias counting output channels."""
    if quantization_type != "linear" or nbits != 8:
        raise ValueError(
            f"only linear weights of 8 bits are documented, found {quantization_type} of {nbits}"
        )
    convolve = _conv(arith, strides, pad_type, pad, dilations, groups)

    def kernel(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None
    ) -> Tensor:
        shape = [-1, *[1] * (weight.dim() - 1)]
        dense = weight.float() * scale.reshape(shape) + shift.reshape(shape)
        return convolve(x, dense, None if bias is None else bias.float())

    return kernel


OPS = (
    Op(
        "conv",
        _conv,
        "x weight bias?",
        matrix=("weight", _has_unit_steps),
        matrix_rank=range(3, 6),
    ),
    Op(
        "conv_quantized",
        _conv_quantized,
        "x weight quant_scale quant_bias bias?",
        note="linear, 8 bits",
    ),
    Op("conv_transpose", _conv_transpose, "x weight bias?"),
)
