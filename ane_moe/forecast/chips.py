"""What the cost model takes each chip to do (`chips.toml`): ranges with their sources, by the names
of the targets."""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ane_moe.errors import UserError

CHIPS = Path(__file__).with_name("chips.toml")
DEFAULT_CHIP = "m4-max"
Scenario = Literal["fast", "expected", "slow"]
SCENARIOS: tuple[Scenario, ...] = ("fast", "expected", "slow")


@dataclass(frozen=True)
class Range:
    """Three values that belong together: none of them is shown without the others."""

    low: float
    expected: float
    high: float

    def of_rate(self, scenario: Scenario) -> float:
        """The value of a rate: the highest is the fast one."""
        return {"fast": self.high, "expected": self.expected, "slow": self.low}[scenario]

    def of_cost(self, scenario: Scenario) -> float:
        """The value of a cost: the lowest is the fast one."""
        return {"fast": self.low, "expected": self.expected, "slow": self.high}[scenario]

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Value:
    """A figure of a chip, and whose it is. confidence: measured, derived or unknown."""

    range: Range
    confidence: str
    source: str


@dataclass(frozen=True)
class Chip:
    """One chip; `values` has the names and units of `chips.toml`."""

    name: str
    values: dict[str, Value]

    def range(self, name: str) -> Range:
        return self.values[name].range

    def weights_per_second(self, rate: str) -> Range | None:
        """How fast weights of the rate class `rate` (fp16, int8, lut) are worked off, in 1e9 a
        second; None where only the memory limits them."""
        value = self.values.get(f"{rate}_gweights_s")
        return None if value is None else value.range


def find_chip(name: str = DEFAULT_CHIP) -> Chip:
    """The chip called `name`. Raises UserError for one that the table does not have."""
    if name not in chip_names():
        raise UserError("no such chip", name, f"choose one of: {', '.join(chip_names())}")
    return Chip(
        name, {key: _value(entry) for key, entry in (_tables()["common"] | _merged(name)).items()}
    )


def chip_names() -> tuple[str, ...]:
    """Every chip by name."""
    return tuple(_tables()["chips"])


def _merged(name: str) -> dict[str, Any]:
    own = dict(_tables()["chips"][name])
    like = own.pop("like", None)
    return (_merged(like) if like else {}) | own


def _value(entry: dict[str, Any]) -> Value:
    return Value(
        Range(entry["low"], entry["expected"], entry["high"]), entry["confidence"], entry["source"]
    )


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(CHIPS.read_text())
