"""The operations that the engine computes in its own way, where their result is fp16.

Everything else keeps its definition. Of a type that the engine does not take (`lstm`, `cumsum`) the
sums are exact, as on the CPU. Where an operation really runs is a question of placement, and not
asked here.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType, ValueType
from ane_moe.runtime.reference.engine import tables
from ane_moe.runtime.reference.engine.arithmetic import EXACT, Engine
from ane_moe.runtime.reference.engine.rounding import decoded
from ane_moe.runtime.reference.ops import OPS
from ane_moe.runtime.reference.ops.conv import pad_spatial, spatial_padding
from ane_moe.runtime.reference.ops.table import Kernel, Maker, Op, OpTable
from ane_moe.runtime.reference.stored_matrix import StoredMatrix

Unary = Callable[[Tensor], Tensor]


# ---- sums of products


def _conv(
    arith: Engine,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Kernel:
    """Every window as a column; the bias is where the sum begins."""

    def kernel(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None) -> Tensor:
        ones = [1] * (x.dim() - 2)
        size = ones if isinstance(weight, StoredMatrix) else weight.shape[2:]
        stride, dilation = strides or ones, dilations or ones
        x = pad_spatial(x, spatial_padding(pad_type, pad, x.shape[2:], size, stride, dilation))
        windows, spatial = _windows(x.float(), size, stride, dilation, groups)
        biases = [None] * groups if bias is None else bias.chunk(groups)
        rows = (
            (weight,)
            if isinstance(weight, StoredMatrix)
            else [own.flatten(1) for own in weight.chunk(groups)]
        )
        parts = map(arith.contract, rows, windows, biases)
        whole = torch.cat(list(parts)).reshape(weight.shape[0], len(x), *spatial)
        return whole.transpose(0, 1)

    return kernel


def _windows(
    x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[list[Tensor], Sequence[int]]:
    """What the kernel meets, by group: `[C*k, B*positions]`, and the positions by dimension."""
    for axis, (k, step, gap) in enumerate(zip(size, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, (k - 1) * gap + 1, step)[..., ::gap]
    spatial = x.shape[2 : 2 + len(size)]
    order = (1, *range(2 + len(size), x.dim()), 0, *range(2, 2 + len(size)))
    columns = x.permute(order).reshape(groups, -1, len(x) * math.prod(spatial))
    return list(columns), spatial


def _linear(arith: Engine) -> Kernel:
    def kernel(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None) -> Tensor:
        rows = x.float().reshape(-1, x.shape[-1])
        return arith.contract(weight, rows.t(), bias).t().reshape(*x.shape[:-1], -1)

    return kernel


# ---- element by element


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """Of numbers as the engine reads them: Inf and NaN are large numbers."""

    def make(arith: Engine) -> Kernel:
        return lambda x, y: arith.elementwise(compute(decoded(x), decoded(y)), x, y)

    return make


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    """By the table of reciprocals. How the engine divides is not published; this loses most."""
    return x * tables.inverse(y)


def _unary(compute: Unary) -> Maker:
    def make(arith: Engine) -> Kernel:
        return lambda x: arith.elementwise(compute(x), x)

    return make


def _by_table(name: str) -> Unary:
    return lambda x: tables.look_up(name, x)


def _with_epsilon(compute: Unary, absent: float) -> Maker:
    def make(arith: Engine, epsilon: float = absent) -> Kernel:
        return lambda x: arith.elementwise(compute(arith.round(x + epsilon)), x)

    return make


def _gelu(arith: Engine, mode: str = "EXACT") -> Kernel:
    """One table for both modes that were measured; the third is written out."""
    if mode != "SIGMOID_APPROXIMATION":
        return lambda x: arith.elementwise(tables.look_up("gelu", x), x)
    sigmoid = _by_table("sigmoid")
    return lambda x: arith.elementwise(x * sigmoid(arith.round(1.702 * x)), x)


# ---- over axes


def _softmax(arith: Engine, axis: int = -1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        x = decoded(x)
        exp = tables.exp(arith.round(x - torch.amax(x, axis, keepdim=True)))
        return arith.elementwise(exp * tables.inverse(arith.sum(exp, (axis,), True)), x)

    return kernel


def _log_sum_exp(
    arith: Engine, axes: Sequence[int] | None = None, keep_dims: bool = False
) -> Kernel:
    """Without taking the largest out first, as the engine does it."""

    def kernel(x: Tensor) -> Tensor:
        over = tuple(range(x.dim())) if axes is None or not len(axes) else tuple(axes)
        return tables.log(arith.sum(tables.exp(x), over, keep_dims))

    return kernel


def _attention(arith: Engine) -> Kernel:
    softmax = _softmax(arith)

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = _fp16(1 / math.sqrt(query.shape[-1]))
        scores = arith.round(arith.matmul(query, key.transpose(-1, -2)) * scale)
        if mask is not None:
            hidden = torch.zeros_like(mask, dtype=torch.float32)
            added = hidden.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else mask
            scores = arith.round(scores + added)
        return arith.matmul(softmax(scores), value)

    return kernel


# Name: maker and, where they are others, tensor inputs.
OWN: dict[str, Maker] = {
    "conv": _conv,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(_quotient),
    "square": _unary(torch.square),
    "sigmoid": _unary(_by_table("sigmoid")),
    "silu": _unary(_by_table("silu")),
    "tanh": _unary(_by_table("tanh")),
    "erf": _unary(_by_table("erf")),
    "exp": _unary(tables.exp),
    "sqrt": _unary(tables.sqrt),
    "sin": _unary(tables.sine),
    "cos": _unary(tables.cosine),
    "softplus": _unary(tables.softplus),
    "gelu": _gelu,
    "log": _with_epsilon(tables.log, 1e-45),
    "inverse": _with_epsilon(tables.inverse, 1e-4),
    "rsqrt": _with_epsilon(tables.rsqrt, 1e-12),
    "softmax": _softmax,
    "reduce_log_sum_exp": _log_sum_exp,
}

# As defined, with the engine's sums of products.
SUMS = frozenset(["matmul", "einsum"])

# As defined, with the engine's sums inside and its rounding of what comes out.
ROUNDED = frozenset(
    [
        "reduce_sum",
        "reduce_sum_square",
        "reduce_l1_norm",
        "reduce_l2_norm",
        "reduce_mean",
        "layer_norm",
        "instance_norm",
        "batch_norm",
        "l2_norm",
        "avg_pool",
        "prelu",
        "leaky_relu",
        "elu",
        "linear_activation",
        "scaled_tanh",
        "softsign",
        "pow",
        "conv_transpose",
        "clip",
        "relu",
        "relu6",
    ]
)


def _engines(op: Op) -> Op:
    """`op` as the engine computes it; as it is where it has no way of its own."""
    if op.name in OWN:
        return replace(op, make=_where_fp16(op, OWN[op.name]), half="widen")
    if op.name in SUMS:
        return replace(op, make=_where_fp16(op, op.make), half="widen", matrix=None)
    if op.name in ROUNDED:
        return replace(op, make=_where_fp16(op, _rounded(op.make)), half="widen")
    return replace(op, make=_exact(op.make)) if "arith" in op.parameters else op


def _where_fp16(op: Op, make: Maker) -> Maker:
    """`make` where the op's result is fp16; elsewhere the op's own maker, with exact sums."""
    exact, wanted = _exact(op.make), _names(make)

    def chosen(out: Sequence[ValueType], arith: Engine, **given: Any) -> Kernel:
        offered = {"out": out, "arith": arith, **given}
        declared = out[0]
        if isinstance(declared, TensorType) and declared.dtype == "fp16":
            narrow = {name: _fp16(value) for name, value in offered.items()}
            return make(**_named(narrow, wanted))
        return exact(**_named(offered, _names(exact)))

    return _with_parameters(chosen, op.make, "out", "arith")


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _fp16(value: Any) -> Any:
    """A parameter as an fp16 number, if it is one to compute with."""
    return torch.tensor(value).half().item() if isinstance(value, float) else value


def _rounded(make: Maker) -> Maker:
    wanted = _names(make)

    def rounding(arith: Engine, **given: Any) -> Kernel:
        kernel = make(**_named({"arith": arith, **given}, wanted))
        return lambda *given: arith.elementwise(kernel(*given), *filter(_is_tensor, given))

    return _with_parameters(rounding, make, "arith")


def _exact(make: Maker) -> Maker:
    if "arith" not in _names(make):
        return make

    def exactly(**given: Any) -> Kernel:
        return make(**given | {"arith": EXACT})

    return _with_parameters(exactly, make)


def _names(make: Maker) -> frozenset[str]:
    return frozenset(inspect.signature(make).parameters)


def _named(offered: dict[str, Any], wanted: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in offered.items() if name in wanted}


def _with_parameters(make: Maker, like: Maker, *more: str) -> Maker:
    """`make` with the parameters of `like`, which the planner reads, and `more`."""
    known = inspect.signature(like).parameters
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in more
        if name not in known
    ]
    listed = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in known.values()]
    make.__signature__ = inspect.Signature([*listed, *added])  # type: ignore[attr-defined]
    return make


ENGINE_TABLE = OpTable(tuple(map(_engines, OPS)))
