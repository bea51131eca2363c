"""Normalisations."""

import math

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Op


def _standardise(arith: Arithmetic, x: Tensor, axes: tuple[int, ...], epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over `axes`, with the variance of the whole
    population."""
    count = math.prod(x.shape[axis] for axis in axes)
    centred = arith.round(x - arith.round(arith.sum(x, axes, True) / count))
    variance = arith.round(arith.sum(arith.round(centred.square()), axes, True) / count)
    return centred * arith.round(torch.rsqrt(variance + epsilon))


def _scale_shift(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


def _channels(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.dim() - 2)]


def _batch_norm(epsilon: float = 1e-5) -> Kernel:
    def kernel(
        x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> Tensor:
        shape = _channels(x)
        y = (x - mean.reshape(shape)) * torch.rsqrt(variance + epsilon).reshape(shape)
        return _scale_shift(y, gamma, beta, shape)

    return kernel


def _instance_norm(arith: Arithmetic, epsilon: float = 1e-5) -> Kernel:
    def kernel(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        y = _standardise(arith, x, tuple(range(2, x.dim())), epsilon)
        return _scale_shift(y, gamma, beta, _channels(x))

    return kernel


def _layer_norm(arith: Arithmetic, axes: list[int] | None = None, epsilon: float = 1e-5) -> Kernel:
    def kernel(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        over = tuple(range(x.dim())) if axes is None else tuple(axis % x.dim() for axis in axes)
        shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
        return _scale_shift(_standardise(arith, x, over, epsilon), gamma, beta, shape)

    return kernel


def _l2_norm(arith: Arithmetic, epsilon: float = 1e-6) -> Kernel:
    """Over the last three axes; those before are batch."""

    def kernel(x: Tensor) -> Tensor:
        return x * torch.rsqrt(arith.sum(arith.round(x.square()), (-3, -2, -1), True) + epsilon)

    return kernel


def _local_response_norm(
    arith: Arithmetic, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Kernel:
    """The window of `size` channels starts size // 2 before its channel, as in PyTorch."""

    def kernel(x: Tensor) -> Tensor:
        squares = arith.round(x.square()).movedim(1, -1)
        padded = torch.nn.functional.pad(squares, (size // 2, (size - 1) // 2))
        total = arith.sum(padded.unfold(-1, size, 1), (-1,), False).movedim(-1, 1)
        return x / (k + alpha / size * total) ** beta

    return kernel


OPS = (
    Op("batch_norm", _batch_norm, "x mean variance gamma? beta?"),
    Op("instance_norm", _instance_norm, "x gamma? beta?"),
    Op("layer_norm", _layer_norm, "x gamma? beta?"),
    Op("l2_norm", _l2_norm),
    Op("local_response_norm", _local_response_norm),
)
