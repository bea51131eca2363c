"""Pooling over one to three spatial dimensions."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ane_moe.runtime.reference.ops.conv import pad_spatial, spatial_padding
from ane_moe.runtime.reference.ops.table import Kernel, Maker, Op

AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
MAXIMUM = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}

Pairs = list[tuple[int, int]]


def _overhang(x: Tensor, pairs: Pairs, kernel: list[int], strides: list[int]) -> Pairs:
    """What `ceil_mode` reads past the padded data, per dimension.

    A last window that would start in the padding after the data is dropped, where there is padding.
    """
    extra = []
    for size, (before, after), k, stride in zip(x.shape[2:], pairs, kernel, strides, strict=True):
        padded = size + before + after
        count = (padded - k + stride - 1) // stride + 1
        if before + after > 0 and (count - 1) * stride >= size + (before + after) / 2:
            count -= 1
        extra.append((0, max(0, (count - 1) * stride + k - padded)))
    return extra


def _pool(reduce: Callable[[Tensor, Pairs, Pairs, list[int], list[int]], Tensor]) -> Maker:
    def make(
        kernel_sizes: list[int],
        pad_type: str,
        strides: list[int] | None = None,
        pad: list[int] | None = None,
        ceil_mode: bool = False,
    ) -> Kernel:
        def kernel(x: Tensor) -> Tensor:
            ones = [1] * len(kernel_sizes)
            steps = strides or ones
            pairs = spatial_padding(pad_type.lower(), pad, x.shape[2:], kernel_sizes, steps, ones)
            extra = _overhang(x, pairs, kernel_sizes, steps) if ceil_mode else [(0, 0)] * len(ones)
            return reduce(x, pairs, extra, kernel_sizes, steps)

        return kernel

    return make


def _sum_windows(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    return AVERAGE[x.dim()](x, kernel, strides) * math.prod(kernel)


def _max(x: Tensor, pairs: Pairs, extra: Pairs, kernel: list[int], strides: list[int]) -> Tensor:
    x = pad_spatial(pad_spatial(x, pairs, -math.inf), extra, -math.inf)
    return MAXIMUM[x.dim()](x, kernel, strides)


def _l2(x: Tensor, pairs: Pairs, extra: Pairs, kernel: list[int], strides: list[int]) -> Tensor:
    return torch.sqrt(
        _sum_windows(pad_spatial(pad_spatial(x.square(), pairs), extra), kernel, strides)
    )


def _avg_pool(
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> Kernel:
    def mean(
        x: Tensor, pairs: Pairs, extra: Pairs, kernel: list[int], strides: list[int]
    ) -> Tensor:
        total = _sum_windows(pad_spatial(pad_spatial(x, pairs), extra), kernel, strides)
        counted = pad_spatial(
            torch.ones_like(x[:1, :1]), pairs, 0.0 if exclude_padding_from_average else 1.0
        )
        return total / _sum_windows(pad_spatial(counted, extra), kernel, strides)

    return _pool(mean)(kernel_sizes, pad_type, strides, pad, ceil_mode)


OPS = (
    Op("avg_pool", _avg_pool),
    Op("max_pool", _pool(_max)),
    Op("l2_pool", _pool(_l2)),
)
