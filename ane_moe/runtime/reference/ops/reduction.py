"""Reductions over axes, softmax and attention."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Kernel, Maker, Op

Axes = Sequence[int] | None


def _over(axes: Axes, x: Tensor) -> tuple[int, ...]:
    """The axes to reduce: all of them when none are named."""
    return tuple(range(x.dim())) if axes is None or not len(axes) else tuple(axes)


def _sum_of(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> Maker:
    def make(arith: Arithmetic, axes: Axes = None, keep_dims: bool = False) -> Kernel:
        return lambda x: after(arith.sum(arith.round(before(x)), _over(axes, x), keep_dims))

    return make


def _same(x: Tensor) -> Tensor:
    return x


def _mean(arith: Arithmetic, axes: Axes = None, keep_dims: bool = False) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        over = _over(axes, x)
        count = math.prod(x.shape[axis] for axis in over)
        total = arith.sum(x, over, keep_dims)
        return (
            total / count
            if x.is_floating_point()
            else torch.div(total, count, rounding_mode="trunc")
        )

    return kernel


def _extreme(reduce: Callable[..., Tensor]) -> Maker:
    def make(axes: Axes = None, keep_dims: bool = False) -> Kernel:
        return lambda x: reduce(x, dim=_over(axes, x), keepdim=keep_dims) if x.dim() else x

    return make


def _prod(arith: Arithmetic, axes: Axes = None, keep_dims: bool = False) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        for axis in sorted((axis % x.dim() for axis in _over(axes, x)), reverse=True):
            x = arith.round(torch.prod(x, dim=axis, keepdim=keep_dims, dtype=x.dtype))
        return x

    return kernel


def _log_sum_exp(arith: Arithmetic, axes: Axes = None, keep_dims: bool = False) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        over = _over(axes, x)
        if not x.dim():
            return x
        top = torch.amax(x, over, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        total = torch.log(arith.sum(arith.round(torch.exp(x - top)), over, True)) + top
        return total if keep_dims else total.reshape(arith.sum(x, over, False).shape)

    return kernel


def _arg(pick: Callable[..., Tensor]) -> Maker:
    def make(
        out: Sequence[TensorType],
        axis: int = -1,
        keep_dims: bool = False,
        output_dtype: str = "int32",
    ) -> Kernel:
        dtype = torch_dtype(out[0].dtype)
        return lambda x: pick(x, dim=axis, keepdim=keep_dims).to(dtype)

    return make


def _softmax(arith: Arithmetic, axis: int = -1) -> Kernel:
    def kernel(x: Tensor) -> Tensor:
        exp = arith.round(torch.exp(arith.round(x - torch.amax(x, axis, keepdim=True))))
        return exp / arith.sum(exp, (axis,), True)

    return kernel


def _attention(arith: Arithmetic) -> Kernel:
    softmax = _softmax(arith, -1)

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = arith.round(
            arith.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        )
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
            )
        return arith.matmul(arith.round(softmax(arith.round(scores))), value)

    return kernel


OPS = (
    Op("reduce_sum", _sum_of(_same, _same)),
    Op("reduce_sum_square", _sum_of(torch.square, _same)),
    Op("reduce_l1_norm", _sum_of(torch.abs, _same)),
    Op("reduce_l2_norm", _sum_of(torch.square, torch.sqrt)),
    Op("reduce_log_sum", _sum_of(_same, torch.log)),
    Op("reduce_log_sum_exp", _log_sum_exp),
    Op("reduce_mean", _mean),
    Op("reduce_prod", _prod),
    Op("reduce_max", _extreme(torch.amax), half="native"),
    Op("reduce_min", _extreme(torch.amin), half="native"),
    Op("reduce_argmax", _arg(torch.argmax), half="native", note="the first of equal elements"),
    Op("reduce_argmin", _arg(torch.argmin), half="native", note="the first of equal elements"),
    Op("softmax", _softmax),
    Op("scaled_dot_product_attention", _attention, "query key value attn_mask?"),
)
