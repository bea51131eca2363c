"""Two programs on the same inputs, or one under two runtimes or precisions: the first op where they
part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.interface import LoadedFunction, NotObserved, Observable
from ane_moe.runtime.reference.tracing import Traced, describe

# Relative L2 beyond which two values have parted; ten fp16 roundings stay well below.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Side:
    """What runs on one side. `options` go to the runtime, e.g. `{"precision": "fp16"}`."""

    path: Path
    runtime: str = "reference"
    function: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Shown(Protocol):
    """What tells a value from others."""

    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


A = TypeVar("A", bound=Shown)
B = TypeVar("B", bound=Shown)


@dataclass(frozen=True)
class Compared:
    """A value that was compared with the other side's of its name, and let go."""

    op: str
    name: str
    shape: tuple[int, ...]


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
    `first_position` how many pairs come before it; None when none is. `only` is in order.

    Of a side `in_part` (A, B) the runtime shows some operations only; why one shows none, `blind`
    says.
    """

    first: Difference | None
    first_position: int | None
    worst: Difference | None
    outputs: tuple[Difference, ...]
    compared: int
    unmatched_a: int
    unmatched_b: int
    only: tuple[Unmatched, ...]
    tolerance: float
    in_part: tuple[str, ...] = ()
    blind: Mapping[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return self.first is None and all(pair.relative <= self.tolerance for pair in self.outputs)

    @property
    def parts_at(self) -> Difference | Unmatched | None:
        """Where the two part: at an operation that one of them lacks, if it comes before `first`.

        None where their values agree, and where nothing but their outputs was compared. What a
        side in part does not show is no place to part.
        """
        if self.same or not self.only or self.in_part:
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

    Intermediates are compared where both runtimes show them, outputs always. Those of a are kept;
    one of b is compared as it comes, and kept only where a has none of its name. Raises UserError
    where the two functions take other inputs.
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
    in_part = tuple(
        name
        for name, function in zip("AB", loaded, strict=True)
        if isinstance(function, Observable) and function.in_part
    )
    first, second = _First(), _Second(bool(in_part))
    results_a, blind_a = _run(loaded[0], given, first)
    second.first = {value.name: value for value in first.values}
    results_b, blind_b = _run(loaded[1], given, second)
    blind = {name: why for name, why in (("A", blind_a), ("B", blind_b)) if why}
    seen_a, seen_b = ((), ()) if blind else (first.values, second.seen)
    pairs = align(seen_a, seen_b)
    differences = [second.difference(x, y) for x, y in pairs]
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
        unmatched_a=len(seen_a) - len(pairs),
        unmatched_b=len(seen_b) - len(pairs),
        only=unmatched(seen_a, seen_b, pairs),
        tolerance=tolerance,
        in_part=in_part,
        blind=blind,
    )


class _First:
    """Keeps what side a shows."""

    def __init__(self) -> None:
        self.values: list[Traced] = []

    def note(self, op: str, _: str, outputs: Mapping[str, np.ndarray]) -> None:
        self.values.extend(describe(op, name, value) for name, value in outputs.items())


class _Second:
    """Compares what side b shows with what side a has of its name, `first`; `seen` is in order."""

    def __init__(self, in_part: bool) -> None:
        self.first: Mapping[str, Traced] = {}
        self.seen: list[Traced | Compared] = []
        self._in_part = in_part
        self._found: dict[str, Difference] = {}

    def note(self, op: str, _: str, outputs: Mapping[str, np.ndarray]) -> None:
        for name, value in outputs.items():
            shown, partner = describe(op, name, value), self.first.get(name)
            if partner is None or partner.op != op:
                self.seen.append(shown)
            else:
                self._found[name] = self._compared(partner, shown)
                self.seen.append(Compared(op, name, value.shape))

    def difference(self, a: Traced, b: Traced | Compared) -> Difference:
        return self._found[b.name] if isinstance(b, Compared) else self._compared(a, b)

    def _compared(self, a: Traced, b: Traced) -> Difference:
        """Where operations became others of Core AI's, a value may have other axes."""
        if self._in_part and a.value.size == b.value.size:
            b = replace(b, value=b.value.reshape(a.shape))
        return compare(a, b)


def _run(
    function: LoadedFunction, inputs: Mapping[str, np.ndarray], side: _First | _Second
) -> tuple[dict[str, Any], str]:
    """What it gives, `side` told of what is inside; and why nothing is told, if so."""
    state = function.make_state() if function.states else None
    if not isinstance(function, Observable):
        return function.predict(dict(inputs), state), "its runtime shows no intermediates"
    try:
        return function.observe(inputs, side.note, state), ""
    except NotObserved as error:
        return function.predict(dict(inputs), state), str(error)


def _like(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of `second` in the order of `first` where they agree, otherwise in their own."""
    return list(first) if first.keys() == second.keys() else list(second)


def align(a: Sequence[A], b: Sequence[B]) -> list[tuple[A, B]]:
    """Pairs in the order of `a`: by name and op first, the rest by the order of equal ops of equal
    shape."""
    by_name = {value.name: value for value in b}
    partner = {
        value.name: by_name[value.name]
        for value in a
        if value.name in by_name and by_name[value.name].op == value.op
    }
    taken = {value.name for value in partner.values()}
    left_a = [value for value in a if value.name not in partner]
    left_b = [value for value in b if value.name not in taken]
    keys_a, keys_b = ([(one.op, one.shape) for one in left] for left in (left_a, left_b))
    for block in SequenceMatcher(None, keys_a, keys_b, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            partner[left_a[block.a + i].name] = left_b[block.b + i]
    return [(value, partner[value.name]) for value in a if value.name in partner]


def unmatched(
    a: Sequence[Shown], b: Sequence[Shown], pairs: Sequence[tuple[Shown, Shown]]
) -> tuple[Unmatched, ...]:
    """What `pairs` leave out of `a` and of `b`, by the pair before which it stands."""
    names = ["", *(x.name for x, _ in pairs)]
    places_a = {x.name: place for place, (x, _) in enumerate(pairs)}
    places_b = {y.name: place for place, (_, y) in enumerate(pairs)}
    only = [*_left_out("A", a, places_a, names), *_left_out("B", b, places_b, names)]
    return tuple(sorted(only, key=lambda item: item.position))


def _left_out(
    side: str, values: Sequence[Shown], places: Mapping[str, int], names: Sequence[str]
) -> list[Unmatched]:
    """Each value without a place, before the earliest of the pairs that follow it on its side."""
    left_out: list[Unmatched] = []
    earliest = len(names) - 1
    for value in reversed(values):
        if value.name in places:
            earliest = min(earliest, places[value.name])
        else:
            left_out.append(
                Unmatched(side, value.op, value.name, value.shape, earliest, names[earliest])
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
