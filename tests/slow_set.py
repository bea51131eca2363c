"""Which of the widest sweeps a run does: none, all of them, or a part that another day's run goes on
from. A sweep is slow where the usual run keeps others of its kind, so that what it would find there
is mostly found by these."""

import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

MARK = "slow"


def slow_but(kept: Collection[Any], rows: Iterable[Any]) -> list[Any]:
    """The rows of a test as its parameters: those that are not kept are left to --slow."""
    return [row if row in kept else pytest.param(row, marks=pytest.mark.slow) for row in rows]


@dataclass(frozen=True)
class SlowSet:
    """Part `part` of `parts`, counted from 0; of no parts, nothing."""

    part: int
    parts: int

    def holds(self, test: str) -> bool:
        """Whether the slow test of this name is of the part."""
        return self.parts > 0 and zlib.crc32(test.encode()) % self.parts == self.part

    def __str__(self) -> str:
        if self.parts < 2:
            return "all" if self.parts else "none"
        return f"part {self.part} of {self.parts}"


def parse_slow(text: str | None) -> SlowSet:
    """Of `all`, of `N/M`, which is part N modulo M, or of nothing. Raises ValueError for others."""
    if text is None:
        return SlowSet(0, 0)
    if text == "all":
        return SlowSet(0, 1)
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"--slow is `all` or `N/M`, not {text!r}")
    return SlowSet(int(found[1]) % int(found[2]), int(found[2]))
