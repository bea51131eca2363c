"""What two runtimes give for the same inputs, and how far apart that is."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ane_moe.manifest import Shard
from ane_moe.verification.gate import NOT_FINITE
from ane_moe.verification.result import ShardResult, json_numbers

# Relative L2 of what a part adds. Core AI's matmul rounds each product and each partial sum to
# fp16 (docs/coreai.md): measured 1.45e-4 times the root of how many there are, 9.2e-3 for 4096.
TOLERANCE = 1e-2


@dataclass
class Sums:
    """What all calls of a function give by one name, in both runtimes; `rounding` is one unit in
    the last place of each of our values."""

    calls: int = 0
    error: float = 0.0
    rounding: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    both: float = 0.0
    largest: float = 0.0
    finite: bool = True

    def add(self, ours: np.ndarray, theirs: np.ndarray, base: np.ndarray | None) -> None:
        """Take in one call: fp16 of one shape, and the input that they are added to."""
        self.calls += 1
        self.finite &= bool(np.isfinite(ours).all() and np.isfinite(theirs).all())
        if not self.finite:
            return
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        self.error += float(np.sum((a - b) ** 2))
        self.largest = max(self.largest, float(np.abs(a - b).max(initial=0)))
        self.rounding += float(np.sum(np.spacing(np.abs(ours)).astype(np.float64) ** 2))
        start = 0.0 if base is None else base.astype(np.float64)
        self.ours += float(np.sum((a - start) ** 2))
        self.theirs += float(np.sum((b - start) ** 2))
        self.both += float(np.sum((a - start) * (b - start)))


@dataclass(frozen=True)
class PairResult:
    """One output or state of a function, in both runtimes, over all calls.

    Errors are relative to what the function adds to its input, where it gives that back with the
    input. `beyond` is the relative L2 error once a unit in the last place is allowed for: each
    runtime rounds its own result. It is what the tolerance is for.
    """

    path: str
    kind: str
    layer: int | None
    function: str
    value: str
    calls: int
    max_abs_error: float
    relative_l2: float
    beyond: float
    cosine: float
    passed: bool
    reason: str | None = None


def paired(shard: Shard, function: str, value: str, sums: Sums, tolerance: float) -> PairResult:
    """The sums as a row, judged."""
    size = math.sqrt(sums.ours)
    beyond = _relative(math.sqrt(max(0.0, sums.error - sums.rounding)), size)
    lengths = math.sqrt(sums.ours * sums.theirs)
    reason = None if beyond <= tolerance else f"relative L2 {beyond:.2e} is above {tolerance:g}"
    row = PairResult(
        shard.path,
        shard.kind,
        shard.layer,
        function,
        value,
        sums.calls,
        sums.largest,
        _relative(math.sqrt(sums.error), size),
        beyond,
        sums.both / lengths if lengths else float(sums.ours == sums.theirs),
        reason is None,
        reason,
    )
    return row if sums.finite else replace(row, passed=False, reason=NOT_FINITE)


def _relative(error: float, size: float) -> float:
    return error / size if size else math.inf if error else 0.0


@dataclass(frozen=True)
class LeftOut:
    """A part that the other runtime does not take, and why."""

    path: str
    why: str


@dataclass(frozen=True)
class AgainstReport:
    """`pairs` are of the two runtimes, `golden` of the other one against Hugging Face's model
    (nothing where inputs are drawn). `parts` distinct ones were found in `shards` packages."""

    passed: bool
    folder: str
    runtime: str
    tolerance: float
    inputs: str  # golden | drawn
    parts: int
    shards: int
    pairs: tuple[PairResult, ...]
    golden: tuple[ShardResult, ...]
    left_out: tuple[LeftOut, ...]

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = json_numbers(asdict(self))
        return document
