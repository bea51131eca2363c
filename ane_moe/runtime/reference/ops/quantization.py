"""Affine quantization of activations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.table import Kernel, Op


def per_axis(values: Tensor, data: Tensor, axis: int | None) -> Tensor:
    """A scalar as it is; a vector shaped to lie along `axis` of `data`."""
    if values.dim() == 0:
        return values
    if axis is None:
        if values.numel() == 1:
            return values.reshape(())
        raise ValueError("a scale per channel needs an axis")
    shape = [1] * data.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _quantize(out: Sequence[TensorType], output_dtype: str, axis: int | None = None) -> Kernel:
    limits = torch.iinfo(torch_dtype(output_dtype))

    def kernel(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        y = torch.round(x / per_axis(scale, x, axis))
        if zero_point is not None:
            y = y + per_axis(zero_point, x, axis).float()
        return y.clamp(limits.min, limits.max).to(torch_dtype(out[0].dtype))

    return kernel


def _dequantize(axis: int | None = None) -> Kernel:
    def kernel(data: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        y = data.float()
        if zero_point is not None:
            y = y - per_axis(zero_point, data, axis).float()
        return y * per_axis(scale, data, axis)

    return kernel


OPS = (
    Op("quantize", _quantize, "input scale zero_point?", since=17),
    Op("dequantize", _dequantize, "input scale zero_point?", since=17),
)
