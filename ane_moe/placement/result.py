"""What a placement check returns, predicted or measured: plain dataclasses, named as in the JSON
document."""

from dataclasses import asdict, dataclass, field
from typing import Any

PREDICTED = "predicted"
MEASURED = "measured"
SEVERITY = {"cpu": 0, "gpu": 1, "uncertain": 2, "ane": 3}


@dataclass(frozen=True)
class Finding:
    """Something that keeps, or may keep, an operation off the engine.

    `op` is None where it concerns the whole function; `against` quotes evidence of the contrary.
    `binding` findings break the gate.
    """

    op: str | None
    op_type: str | None
    verdict: str
    rule: str
    reason: str
    remedy: str
    source: str
    confidence: str
    against: str = ""
    binding: bool = False


@dataclass(frozen=True)
class OpPlacement:
    """One real operation, in program order, by the name of its output.

    `cost` is Core ML's own estimate (share of the function), if measured; `rules` are those that
    decided, if predicted, and `equal` says that only equal costs leave it open.
    """

    op: str
    op_type: str
    verdict: str
    cost: float | None = None
    rules: tuple[str, ...] = ()
    equal: bool = False


@dataclass(frozen=True)
class Stretch:
    """Neighbouring operations that the engine may run, from `first` on, and what decides whether it
    does: their estimates on engine and CPU, and the margin, which is what the best run among them
    saves beyond what a run costs (at least and at most: below zero both, and it stays on the CPU).
    """

    first: str
    ops: int
    verdict: str
    ane_ms: float
    cpu_ms: float
    margin_ms: tuple[float, float]
    turns: str

    @property
    def margin(self) -> str:
        """Both ends where they differ, with signs."""
        low, high = (f"{ms:+.3f}" for ms in self.margin_ms)
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class FunctionPlacement:
    """One function of one package.

    `verdict`: ane or cpu where all operations are there, gpu likewise, mixed, or uncertain.
    `stretches` are predicted, or by Core ML's own figures where those were read; then `expected`
    are the predicted ones.
    """

    path: str
    function: str
    ops: tuple[OpPlacement, ...]
    findings: tuple[Finding, ...]
    allowed: tuple[str, ...] = ()
    weight_bytes: int = 0
    flops: int = 0
    stretches: tuple[Stretch, ...] = ()
    expected: tuple[Stretch, ...] = ()
    segments: tuple[Any, ...] = ()
    numerics: dict[str, dict[str, float]] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """How many operations have this verdict."""
        return sum(op.verdict == verdict for op in self.ops)

    @property
    def verdict(self) -> str:
        verdicts = {op.verdict for op in self.ops}
        if len(verdicts) == 1:
            return verdicts.pop()
        return "mixed" if verdicts - {"ane", "uncertain"} else "uncertain"

    @property
    def cost_share_ane(self) -> float | None:
        """Share of the estimated cost on the engine; None where no cost was reported (always so
        when predicted)."""
        costs = [(op.cost, op.verdict) for op in self.ops if op.cost is not None]
        total = sum(cost for cost, _ in costs)
        return sum(cost for cost, verdict in costs if verdict == "ane") / total if total else None

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that fail the gate: binding, and not on an operation that was allowed off
        the engine."""
        return tuple(
            item for item in self.findings if item.binding and item.op_type not in self.allowed
        )


@dataclass(frozen=True)
class PlacementReport:
    """`source` is predicted or measured, never a mix. A predicted report passes as "no rule
    broken", no more.

    `comparison` is there where a prediction for the same functions was held against the
    measurement: by rule, how many operations it had right and wrong, and where it was undecided,
    how many turned out to be on and off the engine.
    """

    source: str
    target: str
    os: str
    functions: tuple[FunctionPlacement, ...]
    require_measured: bool = False
    comparison: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        if self.require_measured and self.source != MEASURED:
            return False
        return not any(function.broken for function in self.functions)

    def as_json(self) -> dict[str, Any]:
        """The `placement` object of a JSON document."""
        document: dict[str, Any] = {
            "source": self.source,
            "target": self.target,
            "os": self.os,
            "functions": [_function_json(function) for function in self.functions],
            "require_measured": self.require_measured,
            "passed": self.passed,
        }
        return document | (
            {"predictions_by_rule": self.comparison} if self.source == MEASURED else {}
        )


def _function_json(function: FunctionPlacement) -> dict[str, Any]:
    counts = {
        f"ops_{verdict}": function.count(verdict) for verdict in ("ane", "cpu", "gpu", "uncertain")
    }
    numerics = {"numerics": function.numerics} if function.numerics else {}
    return {
        "path": function.path,
        "function": function.function,
        "verdict": function.verdict,
        "ops_total": len(function.ops),
        **counts,
        "cost_share_ane": function.cost_share_ane,
        "weight_bytes": function.weight_bytes,
        "flops": function.flops,
        "stretches": [asdict(stretch) for stretch in function.stretches],
        "stretches_predicted": [asdict(stretch) for stretch in function.expected],
        "findings": [asdict(finding) for finding in function.findings],
        **numerics,
    }


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """What breaks the gate, then what is off the engine, then what may be; otherwise in program
    order."""
    return tuple(sorted(findings, key=lambda item: (not item.binding, SEVERITY[item.verdict])))
