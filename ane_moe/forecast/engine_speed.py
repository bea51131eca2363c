"""What an engine's time depends on beyond a chip's rates (`engine_speed.toml`): the bits of a
weight, the length of a task, the gap before a call."""

import functools
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

from ane_moe.forecast.chips import Range, Scenario

ENGINE_SPEED = Path(__file__).with_name("engine_speed.toml")
FP16_BITS = 16
UNCHANGED = Range(1, 1, 1)


def share_of_fp16(bits: float, chip: str) -> Range:
    """The time of weights stored in `bits` each, over the time of as many in fp16."""
    facts = table("format")
    if chip == facts["chip"]:
        points = [(row["bits"], _spread(row["share"], facts["spread"])) for row in facts["share"]]
    else:
        points = [(row["bits"], _range(row)) for row in facts["elsewhere"]]
    first, last = points[0], points[-1]
    if bits <= first[0]:
        return _scaled(first[1], bits / first[0])
    return _scaled(last[1], bits / last[0]) if bits >= last[0] else _between(points, bits)


def after_task_ms(task_ms: float, scenario: Scenario) -> float:
    """From the end of a task of `task_ms` to the return of its synchronous call, in ms."""
    points = [(row["task"], _range(row)) for row in table("after")["ms"]]
    return _between(points, task_ms).of_cost(scenario)


def clock_factor(gap_ms: float, task_ms: float, chip: str, scenario: Scenario) -> float:
    """How many times longer a task of `task_ms` takes where each call comes `gap_ms` after the one
    before: the engine clocks down. On chips where nobody saw it, the slow end alone has it."""
    facts = table("clock")
    if chip != facts["chip"] and scenario != "slow":
        return 1.0
    points = [(row["gap"], _range(row)) for row in facts["factor"]]
    borne = gap_ms * min(1.0, facts["task_ms"] / task_ms) if task_ms else gap_ms
    return _between([(0.0, UNCHANGED), *points], borne).of_cost(scenario)


def bearable_gap_ms() -> float:
    """The longest gap on the host before a call that leaves the engine its clock, in ms."""
    return float(table("clock")["bearable_gap_ms"])


def table(name: str) -> dict[str, Any]:
    """A table of `engine_speed.toml`."""
    found: dict[str, Any] = _tables()[name]
    return found


def _between(points: list[tuple[float, Range]], x: float) -> Range:
    """Linear between the points, and constant beyond the first and the last."""
    if x <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in pairwise(points):
        if x <= end:
            part = (x - start) / (end - start)
            return _sum(_scaled(low, 1 - part), _scaled(high, part))
    return points[-1][1]


def _scaled(value: Range, factor: float) -> Range:
    return Range(value.low * factor, value.expected * factor, value.high * factor)


def _sum(one: Range, other: Range) -> Range:
    return Range(one.low + other.low, one.expected + other.expected, one.high + other.high)


def _spread(value: float, part: float) -> Range:
    return Range(value * (1 - part), value, value * (1 + part))


def _range(row: dict[str, Any]) -> Range:
    return Range(row["low"], row["expected"], row["high"])


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(ENGINE_SPEED.read_text())
