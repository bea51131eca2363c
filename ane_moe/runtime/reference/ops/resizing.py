"""Resizing by sampling a grid, and exchanging channels or batch for space.

The grids are those of the op documentation of coremltools (iOS15 resize_bilinear and
upsample_bilinear).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ane_moe.runtime.reference.ops.conv import pad_spatial
from ane_moe.runtime.reference.ops.table import Kernel, Op

Grid = Callable[[float, int], Tensor]  # (input size, output size) -> positions, unclamped


def _evenly(spacing: float, count: int, offset: float = 0.0) -> Tensor:
    return torch.arange(count, dtype=torch.float64) * spacing + offset


def _strict_corners(size: float, count: int) -> Tensor:
    return _evenly((size - 1) / (count - 1) if count > 1 else 0.0, count)


def _corners(size: float, count: int) -> Tensor:
    return (
        _strict_corners(size, count)
        if count > 1
        else torch.tensor([(size - 1) / 2], dtype=torch.float64)
    )


def _default(size: float, count: int) -> Tensor:
    return _evenly(size / count, count)


def _offset_corners(size: float, count: int) -> Tensor:
    delta = max(1, size - 1) / count
    return _evenly(delta, count, delta / 2)


def _half_pixel(size: float, count: int) -> Tensor:
    return _evenly(size / count, count, size / count / 2 - 0.5)


GRIDS: dict[str, Grid] = {
    "STRICT_ALIGN_CORNERS": _strict_corners,
    "ALIGN_CORNERS": _corners,
    "DEFAULT": _default,
    "OFFSET_CORNERS": _offset_corners,
    "UNALIGN_CORNERS": _half_pixel,
}


def _linear(x: Tensor, axis: int, count: int, grid: Grid) -> Tensor:
    size = x.shape[axis]
    at = grid(size, count).clamp(0, size - 1)
    low = at.floor().to(torch.int64)
    high = (low + 1).clamp(max=size - 1)
    shape = [1] * x.dim()
    shape[axis] = count
    weight = (at - low).to(torch.float32).reshape(shape)
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight


def _nearest(x: Tensor, axis: int, count: int) -> Tensor:
    source = torch.arange(count) * x.shape[axis] // count
    return x.index_select(axis, source)


def _rounded(x: Tensor, axis: int, count: int) -> Tensor:
    """As `_nearest`, from the pixel nearest to the position and not from the one before it.

    coremltools' tests of the op expect 2 to 3 pixels to read 0, 1, 1. They leave halves open; here
    those go down, so that doubling an axis reads what PyTorch does.
    """
    source = (2 * torch.arange(count) * x.shape[axis] + count - 1) // (2 * count)
    return x.index_select(axis, source.clamp(max=x.shape[axis] - 1))


def _upsample_nearest(scale_factor_height: float = 1, scale_factor_width: float = 1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        x = _nearest(x, -2, math.floor(x.shape[-2] * scale_factor_height))
        return _nearest(x, -1, math.floor(x.shape[-1] * scale_factor_width))

    return kernel


def _resize_nearest(target_size_height: int, target_size_width: int) -> Kernel:
    return lambda x: _nearest(_nearest(x, -2, target_size_height), -1, target_size_width)


def _upsample_bilinear(
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Kernel:
    half = half_pixel_centers if half_pixel_centers is not None else not align_corners
    if align_corners and half:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    grid = _strict_corners if align_corners else _half_pixel if half else _default

    def kernel(x: Tensor) -> Tensor:
        x = _linear(x, x.dim() - 2, math.floor(x.shape[-2] * scale_factor_height), grid)
        return _linear(x, x.dim() - 1, math.floor(x.shape[-1] * scale_factor_width), grid)

    return kernel


def _resize_bilinear(
    target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Kernel:
    grid = GRIDS[sampling_mode]
    return lambda x: _linear(
        _linear(x, x.dim() - 2, target_size_height, grid), x.dim() - 1, target_size_width, grid
    )


def _resize(
    shape: list[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Kernel:
    grid = GRIDS[sampling_mode]
    nearest = interpolation_mode == "NEAREST_NEIGHBOR"
    if nearest and sampling_mode != "DEFAULT":
        raise ValueError(f"nearest neighbour with {sampling_mode} is not documented")

    def kernel(x: Tensor) -> Tensor:
        for axis, wanted in enumerate(shape[len(shape) - resized_dims :], x.dim() - resized_dims):
            if wanted and wanted != x.shape[axis]:
                x = _rounded(x, axis, wanted) if nearest else _linear(x, axis, wanted, grid)
        return x

    return kernel


def _depth_to_space(block_size: int) -> Kernel:
    """Channels are (block row, block column, channel), as in TensorFlow; pixel_shuffle has the
    channel first."""

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = block_size
        return (
            x.reshape(n, b, b, c // (b * b), h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(n, c // (b * b), h * b, w * b)
        )

    return kernel


def _space_to_depth(block_size: int) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = block_size
        blocks = x.reshape(n, c, h // b, b, w // b, b)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)

    return kernel


def _space_to_batch(block_shape: list[int], paddings: list[list[int]]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        x = pad_spatial(x, [(before, after) for before, after in paddings])
        n, c, h, w = x.shape
        p, q = block_shape
        blocks = x.reshape(n, c, h // p, p, w // q, q)
        return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * p * q, c, h // p, w // q)

    return kernel


def _batch_to_space(block_shape: list[int], crops: list[list[int]]) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        p, q = block_shape
        blocks = x.reshape(p, q, n // (p * q), c, h, w).permute(2, 3, 4, 0, 5, 1)
        (top, bottom), (left, right) = crops
        return blocks.reshape(n // (p * q), c, h * p, w * q)[
            :, :, top : h * p - bottom, left : w * q - right
        ]

    return kernel


def _pixel_shuffle(upscale_factor: int) -> Kernel:
    return lambda x: F.pixel_shuffle(x, upscale_factor)


def _pixel_unshuffle(downscale_factor: int) -> Kernel:
    return lambda x: F.pixel_unshuffle(x, downscale_factor)


OPS = (
    Op("upsample_nearest_neighbor", _upsample_nearest, half="native"),
    Op("resize_nearest_neighbor", _resize_nearest, half="native"),
    Op("upsample_bilinear", _upsample_bilinear),
    Op("resize_bilinear", _resize_bilinear),
    Op(
        "resize",
        _resize,
        since=17,
        note="nearest neighbour with DEFAULT sampling only, halves "
        "down; the rest is not documented",
    ),
    Op("depth_to_space", _depth_to_space, half="native"),
    Op("space_to_depth", _space_to_depth, half="native"),
    Op("space_to_batch", _space_to_batch, half="native"),
    Op("batch_to_space", _batch_to_space, half="native"),
    Op("pixel_shuffle", _pixel_shuffle, half="native"),
    Op("pixel_unshuffle", _pixel_unshuffle, half="native", since=16),
)
