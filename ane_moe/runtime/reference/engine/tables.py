"""Functions by the engine's tables: fp16 values with straight lines between them.

All take and give fp16 values in fp32, rounded once, halves away from zero. Infinite numbers and NaN
are read as the large numbers that they are to the engine.
"""

import math

import torch
from torch import Tensor

from ane_moe.runtime.reference.engine.facts import LOG_OF_INF, TABLES, Line, Table
from ane_moe.runtime.reference.engine.fixed_point import LIMIT
from ane_moe.runtime.reference.engine.rounding import decoded, to_fp16

LOG2_E = torch.tensor(math.log2(math.e)).half().item()
LN_2 = math.log(2)


def look_up(name: str, x: Tensor) -> Tensor:
    """The table `name` at `x`, and beyond its ends as `arithmetic.toml` says."""
    table, x = TABLES[name], decoded(x)
    if table.odd:
        return to_fp16(torch.copysign(_extended(table, x.abs()), x))
    return to_fp16(_extended(table, x))


def _extended(table: Table, x: Tensor) -> Tensor:
    y = _between(table, x)
    if table.above:
        y = torch.where(x > table.high, _line(table.values[-1], table.above, x - table.high), y)
    if table.below:
        y = torch.where(x < table.low, _line(table.values[0], table.below, x - table.low), y)
    return y


def _between(table: Table, x: Tensor) -> Tensor:
    place = (x - table.low) / table.step
    index = place.floor().clamp(0, len(table.values) - 2)
    first = table.values[index.long()]
    return first + (place - index) * (table.values[index.long() + 1] - first)


def _line(start: Tensor, line: Line, distance: Tensor) -> Tensor:
    """From `start` on by the line's slope, as far as its end; at once at the end without a
    slope."""
    if not line.slope:
        return torch.full_like(distance, line.end)
    y = start + line.slope * distance
    return y.clamp(max=line.end) if line.end >= start else y.clamp(min=line.end)


def exp(x: Tensor) -> Tensor:
    """2^(x / ln 2), the exponent rounded to fp16: its whole part is the result's exponent."""
    power = to_fp16(decoded(x) * LOG2_E).clamp(-64, 64)
    whole = power.floor()
    return to_fp16(torch.ldexp(_between(TABLES["exp"], power - whole), whole.int()))


def log(x: Tensor) -> Tensor:
    """ln 2 times the exponent and the mantissa's logarithm, each step rounded to fp16.

    -Inf at 0, NaN below; of an infinite number what the engine's table gives.
    """
    infinite, x = x == math.inf, decoded(x)
    mantissa, exponent = torch.frexp(x)
    power = to_fp16(to_fp16(_between(TABLES["log"], mantissa)) + exponent)
    y = to_fp16(power * LN_2)
    y = torch.where(x == 0, -math.inf, torch.where(x < 0, math.nan, y))
    return torch.where(infinite, LOG_OF_INF, y)


def inverse(x: Tensor) -> Tensor:
    x = decoded(x)
    mantissa, exponent = torch.frexp(x.abs())
    y = torch.ldexp(_between(TABLES["inverse"], mantissa), -exponent)
    return to_fp16(torch.copysign(torch.where(x == 0, math.inf, y), x))


def sqrt(x: Tensor) -> Tensor:
    return _root("sqrt", x, 1, 0.0)


def rsqrt(x: Tensor) -> Tensor:
    return _root("rsqrt", x, -1, math.inf)


def _root(name: str, x: Tensor, sign: int, at_zero: float) -> Tensor:
    x = decoded(x)
    mantissa, exponent = torch.frexp(x)
    odd = exponent % 2  # the mantissa takes it: 0.5 to 2
    y = _between(TABLES[name], torch.where(odd == 1, 2 * mantissa, mantissa))
    y = torch.ldexp(y, sign * torch.div(exponent - odd, 2, rounding_mode="floor"))
    y = torch.where(x == 0, at_zero, torch.where(x < 0, math.nan, y))
    return to_fp16(y)


def sine(x: Tensor) -> Tensor:
    """A quarter period and its symmetries. How the range is reduced is not published: exactly."""
    return _sine(decoded(x).double())


def _sine(x: Tensor) -> Tensor:
    turn = torch.remainder(x, 2 * math.pi).float()
    half = torch.remainder(turn, math.pi)
    y = _between(TABLES["sin"], torch.minimum(half, math.pi - half))
    return to_fp16(torch.where(turn >= math.pi, -y, y))


def cosine(x: Tensor) -> Tensor:
    return _sine(decoded(x).double() + math.pi / 2)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) as written: 0 where the sum reaches the accumulator's limit."""
    total = 1 + exp(x)
    return log(torch.where(total >= LIMIT, math.inf, to_fp16(total)))
