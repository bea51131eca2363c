"""Two programs on the same inputs, or one under two runtimes or precisions: the first op where they
part."""

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
from ane_moe.runtime.reference.tracing import Traceable, Traced, describe, trace

# Relative L2 beyond which two values have parted; ten fp16 roundings stay well below.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Side:
    """What runs on one side. `options` go to the runtime, e.g. `{"precision": "fp16"}`."""

    path: Path
    runtime: str = "reference"
    function: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One pair of values. `relative` is |a - b| / |a| in L2, inf where NaN, Inf or shapes
    disagree."""

    op: str
    name_a: str
    name_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float
    largest: float


@dataclass(frozen=True)
class Unmatched:
    """An intermediate that only one side has, after `position` pairs, the last of them `after`
    (as side a names it; empty at the start)."""

    side: str  # A or B
    op: str
    name: str
    shape: tuple[int, ...]
    position: int
    after: str


@dataclass(frozen=True)
class Diff:
    """`first` is the first pair of intermediates beyond the tolerance, in the order of side a, and
    `first_position` how many pairs come before it; None when none is. `only` is in order."""

    first: Difference | None
    first_position: int | None
    worst: Difference | None
    outputs: tuple[Difference, ...]
    compared: int
    unmatched_a: int
    unmatched_b: int
    only: tuple[Unmatched, ...]
    tolerance: float

    @property
    def same(self) -> bool:
        return self.first is None and all(pair.relative <= self.tolerance for pair in self.outputs)

    @property
    def parts_at(self) -> Difference | Unmatched | None:
        """Where the two part: at an operation that one of them lacks, if it comes before `first`.

        None where their values agree, and where nothing but their outputs was compared.
        """
        if self.same or not self.only:
            return self.first
        if self.first_position is not None and self.first_position < self.only[0].position:
            return self.first
        return self.only[0]


def diff(
    a: Side,
    b: Side,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Diff:
    """Run both sides once on `inputs` (what is missing is drawn from `seed`), states fresh, and
    compare.

    Intermediates are compared where both sides are the reference runtime, outputs always. Raises
    UserError where the two functions take other inputs.
    """
    loaded = [
        load_package(side.path, side.function, side.runtime, **side.options) for side in (a, b)
    ]
    names = [sorted(feature.name for feature in function.inputs) for function in loaded]
    if names[0] != names[1]:
        raise UserError("the two functions take different inputs", f"{names[0]} and {names[1]}")
    drawn = random_inputs(
        [feature for feature in loaded[0].inputs if feature.name not in (inputs or {})], seed
    )
    given = {**drawn, **(inputs or {})}
    (results_a, trace_a), (results_b, trace_b) = (_run(function, given) for function in loaded)
    both = trace_a is not None and trace_b is not None
    pairs = align(trace_a or (), trace_b or ()) if both else []
    differences = [compare(x, y) for x, y in pairs]
    outputs = [
        _compare_outputs(x, y, results_a[x], results_b[y])
        for x, y in zip(results_a, _like(results_a, results_b), strict=False)
    ]
    beyond = [index for index, pair in enumerate(differences) if pair.relative > tolerance]
    return Diff(
        first=differences[beyond[0]] if beyond else None,
        first_position=beyond[0] if beyond else None,
        worst=max(differences, key=lambda pair: pair.relative, default=None),
        outputs=tuple(outputs),
        compared=len(pairs),
        unmatched_a=len(trace_a or ()) - len(pairs),
        unmatched_b=len(trace_b or ()) - len(pairs),
        only=unmatched(trace_a or (), trace_b or (), pairs) if both else (),
        tolerance=tolerance,
    )


def _run(
    function: LoadedFunction,
    inputs: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[Traced, ...] | None]:
    state = function.make_state() if function.states else None
    if not isinstance(function, Traceable):
        return function.predict(dict(inputs), state), None
    traced = trace(function, inputs, state)
    return traced.results, traced.values


def _like(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of `second` in the order of `first` where they agree, otherwise in their own."""
    return list(first) if first.keys() == second.keys() else list(second)


def align(a: Sequence[Traced], b: Sequence[Traced]) -> list[tuple[Traced, Traced]]:
    """Pairs in the order of `a`: by name and op first, the rest by the order of equal ops of equal
    shape."""
    by_name = {value.name: value for value in b}
    partner: dict[str, Traced] = {
        value.name: by_name[value.name]
        for value in a
        if value.name in by_name and by_name[value.name].op == value.op
    }
    taken = {value.name for value in partner.values()}
    left_a = [value for value in a if value.name not in partner]
    left_b = [value for value in b if value.name not in taken]
    keys = [[(value.op, value.value.shape) for value in side] for side in (left_a, left_b)]
    for block in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks():
        for i in range(block.size):
            partner[left_a[block.a + i].name] = left_b[block.b + i]
    return [(value, partner[value.name]) for value in a if value.name in partner]


def unmatched(
    a: Sequence[Traced], b: Sequence[Traced], pairs: Sequence[tuple[Traced, Traced]]
) -> tuple[Unmatched, ...]:
    """What `pairs` leave out of `a` and of `b`, by the pair before which it stands."""
    names = ["", *(x.name for x, _ in pairs)]
    places_a = {x.name: place for place, (x, _) in enumerate(pairs)}
    places_b = {y.name: place for place, (_, y) in enumerate(pairs)}
    only = [*_left_out("A", a, places_a, names), *_left_out("B", b, places_b, names)]
    return tuple(sorted(only, key=lambda item: item.position))


def _left_out(
    side: str, values: Sequence[Traced], places: Mapping[str, int], names: Sequence[str]
) -> list[Unmatched]:
    """Each value without a place, before the earliest of the pairs that follow it on its side."""
    left_out: list[Unmatched] = []
    earliest = len(names) - 1
    for value in reversed(values):
        if value.name in places:
            earliest = min(earliest, places[value.name])
        else:
            left_out.append(
                Unmatched(side, value.op, value.name, value.value.shape, earliest, names[earliest])
            )
    return left_out[::-1]


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
