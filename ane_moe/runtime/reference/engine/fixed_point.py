"""Sums of products as the Neural Engine adds them: each product rounded to 2^-16, a sum of 32 bits.

M = rows, K = terms of a sum, N = columns. One unit is 2^-16, so that a 32-bit accumulator reaches
32768. What is exact and why:

* A product of two fp16 numbers has 22 bits. Adding 1.5 x 2^23 units in fp32 leaves its nearest
  whole number of units in the low bits of the sum, as long as it is below 2^22 units (64).
* fp32 rounds halves to even. So each column entry is the next fp32 number away from zero: it lifts
  a half over the middle, and by less than the distance of any other product from it, since it adds
  at most 2^-23 of a product: less than half a unit.
* Sums of those low bits wrap around at 2^32 as the accumulator would, without harm where no partial
  sum can reach 32768; that is known from the sum of magnitudes.
* Whether a product is dropped hangs on exponents alone: for a column entry of exponent e all row
  entries below 2^(-16-e) are, which scaled by 2^(16+e) are those below 1.

Products of 64 and more, and sums that may overflow, take exact paths of their own (fp64, int64).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ane_moe.runtime.reference.engine.facts import ACCUMULATOR
from ane_moe.runtime.reference.engine.rounding import largest

UNITS = 2.0**ACCUMULATOR.fraction_bits
LIMIT = ACCUMULATOR.overflow_at
DROPPED_AT = ACCUMULATOR.drop_if_exponent_sum_at_most
SMALLEST_EXPONENT = -14  # of a normal fp16; subnormals count as this
MAGIC = 1.5 * 2**23
MAGIC_BITS = 0x4B400000
MAGIC_WIDE, LIFT_WIDE = 1.5 * 2**52, 1 + 2.0**-40
NARROW = 64.0  # products below this take the fp32 path
KEEP_ALL = 2.0**25  # lifts every fp16 over 1
BELOW_ONE = 1 - 2.0**-24
BLOCK = 1 << 16  # products at once: 256 KB of fp32, well inside a core's cache
FLAGGED = 1 << 22  # products at once where sums are followed term by term
# The magnitudes are summed in fp32, in any order: sums of less than this share of the limit are
# safe for any number of terms that fits in memory.
SAFE = 1 - 2.0**-7


@dataclass(frozen=True)
class Sums:
    """`total` `[M,N]` in fp32, not yet rounded to fp16, overflows Inf. `dropped` counts products
    that are not zero, and were dropped."""

    total: Tensor
    overflows: int
    dropped: int | None


def dot(w: Tensor, x: Tensor, bias: Tensor | None = None, count: bool = False) -> Sums:
    """`w [M,K] @ x [K,N] + bias [M]`, all of fp16 values in fp32; with `count` drops are counted.

    The result is rounded to fp16, halves away from zero. Source: the rules of arithmetic.toml; the
    order of a sum is that of K, in one accumulator.
    """
    if not w.shape[0] * x.shape[1]:
        return Sums(torch.zeros(w.shape[0], x.shape[1]), 0, 0)
    w, columns = w.contiguous(), x.t().contiguous()  # (M, K), (N, K)
    start = torch.zeros(len(w), dtype=torch.int64) if bias is None else to_units(bias)
    total = start[None, :].repeat(len(columns), 1)  # (N, M) in units
    dropped = _add_products(w, columns, total, count)
    sums = _wrapped(total)
    result = rounded(sums)
    risky = _may_overflow(w, columns, start)
    overflows = _follow(w, columns, start, risky, result) if len(risky) else 0
    return Sums(result.t(), overflows, dropped)


def to_units(bias: Tensor) -> Tensor:
    """Numbers in whole units, int64: halves away from zero."""
    scaled = bias.double() * UNITS
    return (scaled.sign() * (scaled.abs() + 0.5).floor()).long()


def rounded(units: Tensor) -> Tensor:
    """Whole units, int64 below 2^31, as fp16 values in fp32: halves away from zero."""
    magnitude = units.abs()
    _, exponent = torch.frexp(magnitude.double())
    shift = (exponent.long() - 11).clamp(min=0)  # bits beyond fp16's eleven
    kept = ((magnitude + ((1 << shift) >> 1)) >> shift) << shift
    return (kept.double() / UNITS * units.sign()).float() + 0.0


def _wrapped(units: Tensor) -> Tensor:
    return units.to(torch.int32).long()


def _scales(columns: Tensor) -> tuple[Tensor, Tensor]:
    """By what the rows are scaled so that entries below 1 are dropped, and the columns undoing
    it."""
    _, exponent = torch.frexp(columns)
    exponent = (exponent - 1).clamp(min=SMALLEST_EXPONENT)
    # Against a subnormal of the rows, which counts as -14, nothing is dropped from here on.
    keeps_all = (exponent + SMALLEST_EXPONENT > DROPPED_AT) | (columns == 0)
    scale = torch.ldexp(torch.ones_like(columns), exponent - DROPPED_AT - 1)
    scale = torch.where(keeps_all, KEEP_ALL, scale)
    return scale, columns * UNITS / scale


def _lifted(columns: Tensor) -> Tensor:
    """The next number away from zero; zero stays."""
    return columns.nextafter(2 * columns)


def _add_products(w: Tensor, columns: Tensor, total: Tensor, count: bool) -> int | None:
    """Add all products, each rounded to whole units, to `total` `[N,M]`."""
    wide = columns.abs() * largest(w) >= NARROW  # (N, K)
    scale, rest = _scales(columns)
    narrow = torch.where(wide, 0.0, _lifted(rest))
    dropped = _add_narrow(w, scale, narrow, total, count)
    for number in wide.any(1).nonzero().flatten().tolist():
        at = wide[number]
        dropped += _add_wide(w[:, at], scale[number, at], rest[number, at], total[number], count)
    return dropped if count else None


def _add_narrow(w: Tensor, scale: Tensor, narrow: Tensor, total: Tensor, count: bool) -> int:
    """Products below 64, in fp32. Several columns at once where the rows are few."""
    (rows, terms), number = w.shape, len(narrow)
    step = max(1, min(rows, BLOCK // max(1, terms)))
    batch = max(1, BLOCK // max(1, step * terms)) if step == rows else 1
    masked = (scale != KEEP_ALL).any(1).tolist()
    buffer = torch.empty(min(batch, number), step, terms)
    magic, away, dropped = torch.full((1,), MAGIC), -(terms * MAGIC_BITS), 0
    for top in range(0, rows, step):
        block = w[top : top + step]
        there = _nonzero(block) if count else 0
        for first in range(0, number, batch):
            own = slice(first, min(first + batch, number))
            space = buffer[: own.stop - first, : len(block)]
            kept, by = block, narrow[own, None, :]
            if not any(masked[own]):
                by = by * KEEP_ALL
            else:
                kept = _shrunk(block, scale[own, None, :], space)
                if count:
                    dropped += there * len(space) - _nonzero(kept)
            products = torch.addcmul(magic, kept, by, out=space)
            sums = products.view(torch.int32).sum(-1, dtype=torch.int32)
            total[own, top : top + step] += sums.long() + away
    return dropped


def _shrunk(block: Tensor, scale: Tensor, space: Tensor) -> Tensor:
    """`block` scaled, and 0 where that is below 1, in `space`."""
    torch.mul(block, scale, out=space)
    return torch.ops.aten.hardshrink.out(space, BELOW_ONE, out=space)


def _add_wide(w: Tensor, scale: Tensor, rest: Tensor, total: Tensor, count: bool) -> int:
    """As `_add_narrow` for the few terms of one column whose products may be large."""
    kept = _shrunk(w, scale, torch.empty_like(w))
    lifted = rest.double() * LIFT_WIDE
    total += (kept.double() * lifted + MAGIC_WIDE - MAGIC_WIDE).sum(-1).long()
    return _nonzero(w) - _nonzero(kept) if count else 0


def _nonzero(x: Tensor) -> int:
    return int(np.count_nonzero(x.numpy() != 0))  # tens of times faster than torch's


def _may_overflow(w: Tensor, columns: Tensor, start: Tensor) -> Tensor:
    """`[F,2]`: columns and rows of the sums that could reach the limit in some order."""
    beginning = start.abs().float() / UNITS
    rounding = w.shape[1] / UNITS  # of each product by half a unit, and as much again
    bound = columns.abs().sum(1).max() * largest(w) + beginning.max() + rounding
    if bound < LIMIT * SAFE:
        return torch.empty(0, 2, dtype=torch.int64)
    magnitude = columns.abs() @ w.abs().t() + beginning + rounding  # (N, M)
    return (magnitude >= LIMIT * SAFE).nonzero()


def _follow(w: Tensor, columns: Tensor, start: Tensor, pairs: Tensor, result: Tensor) -> int:
    """Write the results of `pairs`, sums followed term by term, into `result`; how many
    overflowed."""
    overflows = 0
    for some in pairs.split(max(1, FLAGGED // max(1, w.shape[1]))):
        column, row = some.unbind(1)
        products = products_in_units(w[row], columns[column])  # (F, K)
        partial = torch.cat([start[row][:, None], products], 1).cumsum(1)
        over = partial.abs() >= LIMIT * UNITS
        sign = partial.gather(1, over.int().argmax(1, keepdim=True)).sign()[:, 0]
        value = rounded(_wrapped(partial[:, -1]))
        hit = over.any(1)
        result[column, row] = torch.where(hit, sign * math.inf, value)
        overflows += int(hit.sum())
    return overflows


def products_in_units(w: Tensor, x: Tensor) -> Tensor:
    """Each product of fp16 values in whole units, int64, by the rules as they are written."""
    exponents = [
        (torch.frexp(one)[1] - 1).clamp(min=SMALLEST_EXPONENT)
        for one in torch.broadcast_tensors(w, x)
    ]
    units = to_units(w.double() * x.double())
    return torch.where(exponents[0] + exponents[1] <= DROPPED_AT, 0, units)
