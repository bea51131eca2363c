"""Two programs on the same inputs, or one under two runtimes or precisions: the first op where they part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.interface import LoadedFunction
from ane_moe.runtime.reference import ReferenceFunction
from ane_moe.runtime.tracing import Traced, describe, trace

TOLERANCE = 1e-2        # relative L2 beyond which two values have parted; ten fp16 roundings stay well below


@dataclass(frozen=True)
class Side:
    """What runs on one side. `options` go to the runtime, e.g. `{"precision": "fp16"}`."""

    path: Path
    runtime: str = "reference"
    function: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One pair of values. `relative` is |a - b| / |a| in L2, inf where NaN, Inf or shapes disagree."""

    op: str
    name_a: str
    name_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float
    largest: float


@dataclass(frozen=True)
class Diff:
    """`first` is the first pair of intermediates beyond the tolerance, in the order of side a; None when none is."""

    first: Difference | None
    worst: Difference | None
    outputs: tuple[Difference, ...]
    compared: int
    unmatched_a: int
    unmatched_b: int
    tolerance: float

    @property
    def same(self) -> bool:
        return self.first is None and all(pair.relative <= self.tolerance for pair in self.outputs)


def diff(a: Side, b: Side, inputs: Mapping[str, np.ndarray] | None = None, seed: int = 0,
         tolerance: float = TOLERANCE) -> Diff:
    """Run both sides once on `inputs` (what is missing is drawn from `seed`), states fresh, and compare.

    Intermediates are compared where both sides are the reference runtime, outputs always. Raises UserError where the
    two functions take other inputs.
    """
    loaded = [load_package(side.path, side.function, side.runtime, **side.options) for side in (a, b)]
    names = [sorted(feature.name for feature in function.inputs) for function in loaded]
    if names[0] != names[1]:
        raise UserError("the two functions take different inputs", f"{names[0]} and {names[1]}")
    drawn = random_inputs([feature for feature in loaded[0].inputs if feature.name not in (inputs or {})], seed)
    given = {**drawn, **(inputs or {})}
    (results_a, trace_a), (results_b, trace_b) = (_run(function, given) for function in loaded)
    both = trace_a is not None and trace_b is not None
    pairs = align(trace_a or (), trace_b or ()) if both else []
    differences = [compare(x, y) for x, y in pairs]
    outputs = [_compare_outputs(x, y, results_a[x], results_b[y])
               for x, y in zip(results_a, _like(results_a, results_b), strict=False)]
    return Diff(
        first=next((pair for pair in differences if pair.relative > tolerance), None),
        worst=max(differences, key=lambda pair: pair.relative, default=None),
        outputs=tuple(outputs), compared=len(pairs), unmatched_a=len(trace_a or ()) - len(pairs),
        unmatched_b=len(trace_b or ()) - len(pairs), tolerance=tolerance)


def _run(function: LoadedFunction, inputs: Mapping[str, np.ndarray],
         ) -> tuple[dict[str, np.ndarray], tuple[Traced, ...] | None]:
    state = function.make_state() if function.states else None
    if not isinstance(function, ReferenceFunction):
        return function.predict(dict(inputs), state), None
    traced = trace(function, inputs, state)
    return traced.results, traced.values


def _like(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of `second` in the order of `first` where they agree, otherwise in their own."""
    return list(first) if first.keys() == second.keys() else list(second)


def align(a: Sequence[Traced], b: Sequence[Traced]) -> list[tuple[Traced, Traced]]:
    """Pairs in the order of `a`: by name and op first, the rest by the order of equal ops of equal shape."""
    by_name = {value.name: value for value in b}
    partner: dict[str, Traced] = {
        value.name: by_name[value.name] for value in a
        if value.name in by_name and by_name[value.name].op == value.op}
    taken = {value.name for value in partner.values()}
    left_a = [value for value in a if value.name not in partner]
    left_b = [value for value in b if value.name not in taken]
    keys = [[(value.op, value.value.shape) for value in side] for side in (left_a, left_b)]
    for block in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks():
        for i in range(block.size):
            partner[left_a[block.a + i].name] = left_b[block.b + i]
    return [(value, partner[value.name]) for value in a if value.name in partner]


def _compare_outputs(name_a: str, name_b: str, a: Any, b: Any) -> Difference:
    """As `compare`. Labels are the same or infinitely apart; probabilities go label by label."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        a, b = (np.array([side[label] for label in a]) for side in (a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return compare(describe("output", name_a, a), describe("output", name_b, b))
    apart = 0.0 if a == b else np.inf
    return Difference("output", name_a, name_b, (), (), apart, apart)


def compare(a: Traced, b: Traced) -> Difference:
    x, y = a.value.astype(np.float64), b.value.astype(np.float64)
    relative = largest = np.inf
    if x.shape == y.shape and np.array_equal(np.isnan(x), np.isnan(y)):
        with np.errstate(invalid="ignore"):
            gap = np.where((x == y) | np.isnan(x), 0.0, np.abs(x - y))
        finite = np.where(np.isfinite(x), x, 0.0)
        largest = float(gap.max(initial=0.0))
        norm = float(np.linalg.norm(finite))
        relative = float(np.linalg.norm(gap)) / norm if norm else (np.inf if largest else 0.0)
    return Difference(a.op, a.name, b.name, x.shape, y.shape, float(relative), float(largest))
