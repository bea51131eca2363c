"""What is published of the engine's arithmetic (`arithmetic.toml`)."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("arithmetic.toml")


@dataclass(frozen=True)
class Accumulator:
    """The fixed-point sum of products, in units of 2^-fraction_bits."""

    fraction_bits: int
    overflow_at: float
    drop_if_exponent_sum_at_most: int
    tested_terms: int


@dataclass(frozen=True)
class Line:
    """How a table goes on beyond its end: by `slope`, as far as the value `end`."""

    slope: float
    end: float


@dataclass(frozen=True)
class Table:
    """A function as `values` (fp16) at `low`, `low + step`, ... `odd`: for positive numbers only.

    `max_abs_error` is the published one, None where it is not a single figure.
    """

    low: float
    step: float
    values: Tensor
    confidence: str
    odd: bool
    above: Line | None
    below: Line | None
    max_abs_error: float | None

    @property
    def high(self) -> float:
        return self.low + self.step * (len(self.values) - 1)


def _table(row: dict[str, Any]) -> Table:
    above, below = (Line(*row[side]) if side in row else None for side in ("above", "below"))
    values = torch.tensor(row["values"], dtype=torch.float32)
    error, odd = row.get("max_abs_error"), row.get("odd", False)
    return Table(row["low"], row["step"], values, row["confidence"], odd, above, below, error)


_FACTS = tomllib.loads(FILE.read_text())

CHIPS: tuple[str, ...] = tuple(_FACTS["chips"])
SYSTEMS: tuple[int, ...] = tuple(_FACTS["systems"])
ACCUMULATOR = Accumulator(
    **{field: _FACTS["accumulator"][field] for field in Accumulator.__dataclass_fields__}
)
LOG_OF_INF: float = _FACTS["softplus"]["log_of_inf"]
TABLES = {name: _table(row) for name, row in _FACTS["table"].items()}
