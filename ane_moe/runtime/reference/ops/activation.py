"""Activation functions."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ane_moe.runtime.reference.ops.table import Kernel, Op, plain

GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "EXACT": F.gelu,
    "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
    "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
}


def _gelu(mode: str = "EXACT") -> Kernel:
    return GELU[mode]


def _clamped_relu(alpha: float, beta: float) -> Kernel:
    return lambda x: torch.clamp(torch.where(x >= 0, x, alpha * x), max=beta)


def _elu(alpha: float) -> Kernel:
    return lambda x: torch.where(x > 0, x, alpha * torch.expm1(x))


def _leaky_relu(alpha: float) -> Kernel:
    return lambda x: torch.where(x >= 0, x, alpha * x)


def _linear_activation(alpha: float, beta: float) -> Kernel:
    return lambda x: alpha * x + beta


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """One value per channel, channels being axis 1 of `x`."""
    return values.reshape(-1, *[1] * (x.dim() - 2))


def _prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, _per_channel(alpha, x) * x)


def _scaled_tanh(alpha: float, beta: float) -> Kernel:
    return lambda x: alpha * torch.tanh(beta * x)


def _sigmoid_hard(alpha: float, beta: float) -> Kernel:
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


def _softplus(x: Tensor) -> Tensor:
    return (
        F.softplus(x, threshold=math.inf)
        if x.dtype is torch.float64
        else torch.logaddexp(x, torch.zeros_like(x))
    )


def _softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _per_channel(alpha, x) * _softplus(x * _per_channel(beta, x))


def _thresholded_relu(alpha: float) -> Kernel:
    return lambda x: torch.where(x >= alpha, x, 0.0)


OPS = (
    Op("relu", plain(torch.relu), half="native"),
    Op("relu6", plain(F.relu6), half="native"),
    Op("sigmoid", plain(torch.sigmoid), half="native"),
    Op("silu", plain(F.silu), half="native"),
    Op("gelu", _gelu),
    Op("clamped_relu", _clamped_relu),
    Op("elu", _elu),
    Op("leaky_relu", _leaky_relu),
    Op("linear_activation", _linear_activation),
    Op("prelu", plain(_prelu), "x alpha"),
    Op("scaled_tanh", _scaled_tanh),
    Op("sigmoid_hard", _sigmoid_hard),
    Op("softplus", plain(_softplus)),
    Op("softplus_parametric", plain(_softplus_parametric), "x alpha beta"),
    Op("softsign", plain(F.softsign)),
    Op("thresholded_relu", _thresholded_relu),
)
