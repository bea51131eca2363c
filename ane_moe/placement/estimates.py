"""What Core ML's segmenter thinks an operation takes on the engine and on the CPU
(`estimates.toml`), for one target."""

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.placement.predicate import Term, compile_condition, compile_term
from ane_moe.placement.rules import covers
from ane_moe.placement.targets import Target

ESTIMATES = Path(__file__).with_name("estimates.toml")
GIB = 2**30
MS_PER_SECOND = 1e3
OPS_PER_BYTE = 1.048576  # 2**20 / 1e6: the study's unit
NO_TRAFFIC = {"work": "0", "bytes": "bytes_in + bytes_out + bytes_literal"}
ELEMENTWISE = "2 * elements_first"  # work of what has no leaf yet
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Milliseconds on the engine and on the CPU's two backends."""

    ane_ms: float
    bnns_ms: float
    classic_ms: float

    @property
    def times(self) -> tuple[float, float, float]:
        return self.ane_ms, self.bnns_ms, self.classic_ms

    @property
    def cpu_ms(self) -> float:
        return min(self.bnns_ms, self.classic_ms)

    @property
    def saved_ms(self) -> float:
        """What the engine saves, before what a run costs."""
        return self.cpu_ms - self.ane_ms

    @property
    def without_saving(self) -> "Estimate":
        """The same on the CPU as on the engine."""
        return Estimate(self.ane_ms, self.ane_ms, self.ane_ms)


@dataclass(frozen=True)
class RunCost:
    """What a run of operations on the engine costs, at least and at most, and what the first one
    may cost on top after operations on the CPU."""

    least_ms: float
    most_ms: float
    after_cpu_ms: float


@dataclass(frozen=True)
class _Leaf:
    holds: Callable[[Facts], bool]
    formula: str
    work: Term
    rate: tuple[float, ...]
    own: bool  # of this target's chip and system


class EstimateBook:
    """The rows of `estimates.toml` for one target. `covered`: whether the estimates of its chip
    were read by anybody."""

    def __init__(self, tables: dict[str, Any], target: Target):
        row = next(row for row in tables["run"] if _is_for(row, target))
        least_ms, most_ms = row["ms"]
        self.run = RunCost(least_ms, most_ms, row["after_cpu_ms"])
        self.covered: bool = row["covered"]
        self._roofline = next(row for row in tables["roofline"] if _is_for(row, target))
        self._leaves: dict[str, list[_Leaf]] = {}
        for row in tables["leaf"]:
            holds = compile_condition(row["when"]) if "when" in row else lambda facts: True
            leaf = _Leaf(
                holds, row["work"], compile_term(row["work"]), row["rate"], _is_for(row, target)
            )
            for kind in row["ops"]:
                self._leaves.setdefault(kind, []).append(leaf)
        rows = {kind: row for row in tables["traffic"] for kind in row["ops"]}
        self._traffic = {kind: _terms(NO_TRAFFIC | row) for kind, row in rows.items()}

    def candidates(self, facts: Facts) -> tuple[Estimate, ...]:
        """What the operation may be estimated at: one where that is known.

        Where it is not, the leaves of other chips, wherever they hold there, and that the engine
        saves nothing. Facts that a plan does not have count as nothing.
        """
        roofline = self._by_roofline(facts)
        leaves = self._leaves.get(str(facts["op"]), ())
        if not leaves:
            return (roofline,)
        known = [leaf for leaf in leaves if leaf.own and leaf.holds(_measured(leaf, facts))]
        found = [_by_leaf(leaf, facts, roofline) for leaf in known or leaves]
        if not known:
            found.append(found[0].without_saving)
        return tuple(dict.fromkeys(found))

    def work_of(self, kind: str) -> str:
        """How the work of an operation is counted where it has a leaf."""
        leaves = self._leaves.get(kind)
        return leaves[0].formula if leaves else ELEMENTWISE

    def measures(self, facts: Facts) -> tuple[float, float]:
        """Its work, and operations per byte."""
        work = compile_term(self.work_of(str(facts["op"])))(facts) or 0
        return work, _per_byte(work, facts)

    def weights_for(self, saved_ms: float) -> float:
        """How many weights in 1x1 convolutions save as much for one token."""
        convolution = {"op": "conv", "flops": 2e6, "dilation": 1, "bytes_in": 2e6}  # 1e6 of them
        return 1e6 * saved_ms / self.candidates(convolution)[0].saved_ms

    def _by_roofline(self, facts: Facts) -> Estimate:
        """The larger of operations at the peak rate and bytes at the bandwidth."""
        terms = self._traffic.get(str(facts["op"])) or _terms(NO_TRAFFIC)
        work, moved = (term(facts) or 0 for term in terms)
        row = self._roofline
        return Estimate(
            *(
                MS_PER_SECOND * max(work / (peak * 1e9), moved / (bandwidth * GIB))
                for peak, bandwidth in zip(row["gflop_s"], row["gib_s"], strict=True)
            )
        )


def estimate_book(target: Target) -> EstimateBook:
    """The rows that hold for `target`, a chip and a system."""
    return EstimateBook(load_estimates(), target)


@functools.cache
def load_estimates() -> dict[str, Any]:
    return tomllib.loads(ESTIMATES.read_text())


def _measured(leaf: _Leaf, facts: Facts) -> Facts:
    """The facts, and what the conditions of leaves ask of work and traffic."""
    work = leaf.work(facts) or 0
    return {**facts, "work": work, "ops_per_byte": _per_byte(work, facts)}


def _per_byte(work: float, facts: Facts) -> float:
    moved = (facts.get("bytes_in") or 0) + (facts.get("bytes_out") or 0)
    return OPS_PER_BYTE * work / max(1, moved)


def _by_leaf(leaf: _Leaf, facts: Facts, roofline: Estimate) -> Estimate:
    work = leaf.work(facts) or 0
    pairs = zip(leaf.rate, roofline.times, strict=True)
    return Estimate(*(work / rate / 1e6 if rate else time for rate, time in pairs))


def _terms(row: dict[str, str]) -> tuple[Term, Term]:
    return compile_term(row["work"]), compile_term(row["bytes"])


def _is_for(row: dict[str, Any], target: Target) -> bool:
    return covers(row.get("chips", "all"), target.number, target.device) and covers(
        row.get("os", "all"), target.os, ""
    )
