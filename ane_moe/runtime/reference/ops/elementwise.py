"""Arithmetic, comparison and logic, element by element with numpy's broadcasting."""

import torch
from torch import Tensor

from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.table import Kernel, Op, plain


def _exp2(x: Tensor) -> Tensor:
    return torch.exp2(x) if x.is_floating_point() else torch.exp2(x.double()).to(x.dtype)


# torch's CPU kernels for these convert fp16 to fp32, compute and round once, so they need no
# widening (the tests compare each with its widened form on every fp16 number).
NATIVE_UNARY: dict[str, Kernel] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "exp": torch.exp,
    "exp2": _exp2,
    "floor": torch.floor,
    "identity": lambda x: x,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "square": torch.square,
    "tanh": torch.tanh,
}

WIDENED_UNARY: dict[str, Kernel] = {
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "tan": torch.tan,
}

NATIVE_BINARY: dict[str, Kernel] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


WIDENED_BINARY: dict[str, Kernel] = {
    "real_div": _real_div,
    "floor_div": _floor_div,
    "mod": torch.remainder,
    "pow": torch.pow,
}


def _clip(alpha: float, beta: float) -> Kernel:
    return lambda x: torch.clamp(x, alpha, beta)


def _inverse(epsilon: float = 1e-4) -> Kernel:
    return lambda x: torch.reciprocal(x + epsilon)


def _log(epsilon: float = 1e-45) -> Kernel:
    return lambda x: torch.log(x + epsilon)


def _rsqrt(epsilon: float = 1e-12) -> Kernel:
    return lambda x: torch.rsqrt(x + epsilon)


def _threshold(alpha: float) -> Kernel:
    return lambda x: torch.clamp(x, min=alpha)


def _cast(dtype: str) -> Kernel:
    target = torch_dtype(dtype)
    if dtype == "uint16":
        return lambda x: x.to(target) & 0xFFFF  # held in int32
    return lambda x: (x != 0) if target is torch.bool else x.to(target)


OPS = (
    *(Op(name, plain(kernel), "x", "native") for name, kernel in NATIVE_UNARY.items()),
    *(Op(name, plain(kernel), "x") for name, kernel in WIDENED_UNARY.items()),
    *(
        Op(name, plain(kernel), "x y", "native", alike="x y")
        for name, kernel in NATIVE_BINARY.items()
    ),
    *(Op(name, plain(kernel), "x y", alike="x y") for name, kernel in WIDENED_BINARY.items()),
    Op("clip", _clip, half="native"),
    Op("inverse", _inverse, note="adds epsilon, 1e-4 when absent"),
    Op("log", _log, note="adds epsilon, 1e-45 when absent"),
    Op("rsqrt", _rsqrt, note="adds epsilon, 1e-12 when absent"),
    Op("threshold", _threshold, half="native"),
    Op("cast", _cast, half="native"),
)
