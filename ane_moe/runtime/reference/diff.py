"""Two programs on the same inputs, or one under two runtimes or precisions: the first op where they
part."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.interface import (
    Intermediate,
    LoadedFunction,
    NotObserved,
    Observable,
    Observer,
)
from ane_moe.runtime.reference.tracing import Traced, describe

# Relative L2 beyond which two values have parted; ten fp16 roundings stay well below.
TOLERANCE = 1e-2
# The same of two runtimes, which add up in other orders and precisions: a softmax of sound pairs
# was seen at 0.017 and a count behind it at 0.046, a wrong constant is mostly far above. A gap of
# fp16's least normal number is none then: below it one runtime may keep what another drops.
ACROSS, LEAST_GAP = 5e-2, 2.0**-14


@dataclass(frozen=True)
class Side:
    """What runs on one side. `options` go to the runtime, e.g. `{"precision": "fp16"}`."""

    path: Path
    runtime: str = "reference"
    function: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A value that was shown, without its numbers."""

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

    def beyond(self, tolerance: float, least_gap: float) -> bool:
        return self.relative > tolerance and self.largest > least_gap


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
    says. What is nowhere apart by more than `least_gap` has not parted, however small it is.
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
    least_gap: float = 0.0
    in_part: tuple[str, ...] = ()
    blind: Mapping[str, str] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return self.first is None and not any(
            pair.beyond(self.tolerance, self.least_gap) for pair in self.outputs
        )

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
    tolerance: float | None = None,
) -> Diff:
    """Run both sides once on `inputs` (what is missing is drawn from `seed`), states fresh, and
    compare.

    Intermediates are compared where both runtimes show them, outputs always. Which belong together
    is known from the programs, before they run. Of a's those are kept that have a partner; one of
    b is compared as it comes, and let go. `tolerance` None: TOLERANCE, and of two runtimes ACROSS
    beyond LEAST_GAP. Raises UserError where the two functions take other inputs, and for a
    tolerance below 0 or that is no number.
    """
    allowed, least_gap = _allowed(tolerance, a.runtime == b.runtime)
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
    (listed_a, blind_a), (listed_b, blind_b) = map(_listed, loaded)
    blind = {name: why for name, why in (("A", blind_a), ("B", blind_b)) if why}
    pairs = [] if blind else align(listed_a, listed_b)
    first = _First({x.name for x, _ in pairs})
    results_a = _run(loaded[0], given, None if blind else first.note)
    partners = {y.name: first.values[x.name] for x, y in pairs if x.name in first.values}
    second = _Second(partners, bool(in_part))
    results_b = _run(loaded[1], given, None if blind else second.note)
    pairs = [(x, y) for x, y in pairs if y.name in second.found]
    differences = [second.found[y.name] for _, y in pairs]
    outputs = [
        _compare_outputs(x, y, results_a[x], results_b[y])
        for x, y in zip(results_a, _like(results_a, results_b), strict=False)
    ]
    beyond = [index for index, pair in enumerate(differences) if pair.beyond(allowed, least_gap)]
    return Diff(
        first=differences[beyond[0]] if beyond else None,
        first_position=beyond[0] if beyond else None,
        worst=max(differences, key=lambda pair: pair.relative, default=None),
        outputs=tuple(outputs),
        compared=len(pairs),
        unmatched_a=len(first.seen) - len(pairs),
        unmatched_b=len(second.seen) - len(pairs),
        only=unmatched(first.seen, second.seen, pairs),
        tolerance=allowed,
        least_gap=least_gap,
        in_part=in_part,
        blind=blind,
    )


def _allowed(tolerance: float | None, one_runtime: bool) -> tuple[float, float]:
    """The relative difference and the gap beyond which values have parted."""
    if tolerance is None:
        return (TOLERANCE, 0.0) if one_runtime else (ACROSS, LEAST_GAP)
    if not 0 <= tolerance < np.inf:
        raise UserError("the tolerance is not possible", f"{tolerance:g}", "give 0 or more")
    return tolerance, 0.0


class _First:
    """What side a shows, in order, with the values of the `paired` names."""

    def __init__(self, paired: Collection[str]) -> None:
        self.seen: list[Seen] = []
        self.values: dict[str, Traced] = {}
        self._paired = paired

    def note(self, op: str, _: str, outputs: Mapping[str, np.ndarray]) -> None:
        for name, value in outputs.items():
            self.seen.append(Seen(op, name, value.shape))
            if name in self._paired:
                self.values[name] = describe(op, name, value)


class _Second:
    """What side b shows, in order, and what was `found` where side a has a partner of it, both by
    b's name."""

    def __init__(self, partners: Mapping[str, Traced], in_part: bool) -> None:
        self.seen: list[Seen] = []
        self.found: dict[str, Difference] = {}
        self._partners, self._in_part = partners, in_part

    def note(self, op: str, _: str, outputs: Mapping[str, np.ndarray]) -> None:
        for name, value in outputs.items():
            self.seen.append(Seen(op, name, value.shape))
            if name in self._partners:
                self.found[name] = self._compared(self._partners[name], describe(op, name, value))

    def _compared(self, a: Traced, b: Traced) -> Difference:
        """Where operations became others of Core AI's, a value may have other axes."""
        if self._in_part and a.value.size == b.value.size:
            b = replace(b, value=b.value.reshape(a.shape))
        return compare(a, b)


def _listed(function: LoadedFunction) -> tuple[tuple[Intermediate, ...], str]:
    """What a function will show; and why nothing, if so."""
    if not isinstance(function, Observable):
        return (), "its runtime shows no intermediates"
    try:
        return function.intermediates(), ""
    except NotObserved as error:
        return (), str(error)


def _run(
    function: LoadedFunction, inputs: Mapping[str, np.ndarray], told: Observer | None
) -> dict[str, Any]:
    """What it gives, `told` of what is inside."""
    state = function.make_state() if function.states else None
    if told is None or not isinstance(function, Observable):
        return function.predict(dict(inputs), state)
    return function.observe(inputs, told, state)


def _like(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of `second` in the order of `first` where they agree, otherwise in their own."""
    return list(first) if first.keys() == second.keys() else list(second)


def align(
    a: Sequence[Intermediate], b: Sequence[Intermediate]
) -> list[tuple[Intermediate, Intermediate]]:
    """Pairs of equal ops, in the order of both.

    As many as possible of equal shape (one that is not known equals any), and among the ways to
    pair so many the one with most equal names. Names alone say little: exporting numbers most of
    them, and one operation more moves the numbers of those behind it. Beside one of its own kind
    and shape, which of the two is the one more is not known.
    """
    start = _common(a, b)
    a_left, b_left = a[start:], b[start:]
    end = _common(a_left[::-1], b_left[::-1])
    middle_a, middle_b = a_left[: len(a_left) - end], b_left[: len(b_left) - end]
    places = _heaviest(_weights(middle_a, middle_b), len(middle_b))
    return [
        *zip(a[:start], b[:start], strict=True),
        *((middle_a[i], middle_b[j]) for i, j in places),
        *zip(a[len(a) - end :], b[len(b) - end :], strict=True),
    ]


def _common(a: Sequence[Intermediate], b: Sequence[Intermediate]) -> int:
    """How many at the beginning are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def _weights(a: Sequence[Intermediate], b: Sequence[Intermediate]) -> Iterator[np.ndarray]:
    """For each of `a` what a pair with each of `b` counts, int64 `[b]`; 0 where ops differ."""
    codes: dict[Any, int] = {None: 0}

    def coded(keys: Iterable[Any]) -> np.ndarray:
        return np.array([codes.setdefault(key, len(codes)) for key in keys], np.int64)

    ops, names, shapes = (coded(getattr(one, key) for one in b) for key in ("op", "name", "shape"))
    for one in a:
        op, name, shape = (codes.get(key, -1) for key in (one.op, one.name, one.shape))
        alike = (shapes == shape) | (shapes == 0) | (shape == 0)
        yield (ops == op) * (alike * (len(b) + 1) + (names == name))


def _heaviest(rows: Iterable[np.ndarray], columns: int) -> list[tuple[int, int]]:
    """The places `(row, column)`, rising in both, whose weights add up to most: a longest common
    subsequence (Needleman and Wunsch 1970), a row at a time."""
    best, steps = np.zeros(columns + 1, np.int64), list[np.ndarray]()
    for weights in rows:
        paired = np.where(weights > 0, best[:-1] + weights, 0)
        higher = np.maximum(best[1:], paired)
        row = np.maximum.accumulate(higher)
        # 2: a pair; 1: this row is in none; 0: this column is in none
        steps.append(np.where(row > higher, 0, np.where(paired > best[1:], 2, 1)).astype(np.int8))
        best = np.concatenate([[0], row])
    pairs, at, column = list[tuple[int, int]](), len(steps) - 1, columns - 1
    while at >= 0 and column >= 0:
        step = int(steps[at][column])
        if step == 2:
            pairs.append((at, column))
        at, column = at - (step > 0), column - (step != 1)
    return pairs[::-1]


def unmatched(
    a: Sequence[Seen], b: Sequence[Seen], pairs: Sequence[tuple[Intermediate, Intermediate]]
) -> tuple[Unmatched, ...]:
    """What `pairs` leave out of `a` and of `b`, by the pair before which it stands."""
    names = ["", *(x.name for x, _ in pairs)]
    places_a = {x.name: place for place, (x, _) in enumerate(pairs)}
    places_b = {y.name: place for place, (_, y) in enumerate(pairs)}
    only = [*_left_out("A", a, places_a, names), *_left_out("B", b, places_b, names)]
    return tuple(sorted(only, key=lambda item: item.position))


def _left_out(
    side: str, values: Sequence[Seen], places: Mapping[str, int], names: Sequence[str]
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
