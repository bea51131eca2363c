"""Which operations go to the engine, as Core ML's segmenter decides it: the cheapest way through
operation x backend.

Operations stand in file order, as one chain. Each costs its estimate on the backend it is given
to, each run of operations on the engine a launch, and what is not legal there is on the CPU. What
is not known (a leaf, the price of a run, which of two equal ways) is decided both ways. Method and
figures: 751K/Apple-Neural-Engine-Microarchitecture-Study-M6, of whose 482 graphs this places none
otherwise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ane_moe.placement.estimates import Estimate, RunCost

EQUAL_MS = 1e-9  # ways that differ by less are equal
# A bound of what is not known is not reached: there is no tie at it.
ABOVE_BOUND_MS = 2 * EQUAL_MS
NEVER = float("-inf")


@dataclass(frozen=True)
class Choice:
    """What is known of one operation: whether the engine may run it, and its possible estimates
    (one, where it is known)."""

    legal: bool
    estimates: tuple[Estimate, ...]
    count: int = 1

    def saved_ms(self, least: bool) -> float:
        """What the engine saves, by the estimate that speaks against it or for it."""
        saved = [self.count * estimate.saved_ms for estimate in self.estimates]
        if not least:
            return max(saved)
        return min(saved) + (ABOVE_BOUND_MS if len(saved) > 1 else 0.0)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring operations (by index, `stop` not among them) that the engine may run.

    `ane_ms` and `cpu_ms` are the estimates of all of them; `margin_ms` what the best run among them
    saves beyond its price, at least and at most: below zero both, it stays on the CPU.
    """

    start: int
    stop: int
    ane_ms: float
    cpu_ms: float
    margin_ms: tuple[float, float]


@dataclass(frozen=True)
class Dispatch:
    """By operation: whether it is surely, and possibly, on the engine, and whether only equal costs
    leave it open."""

    surely: tuple[bool, ...]
    possibly: tuple[bool, ...]
    equal: tuple[bool, ...]
    stretches: tuple[Stretch, ...]


def dispatch(choices: Sequence[Choice], run: RunCost) -> Dispatch:
    """Place every operation of a function, given in file order."""
    least = [item.saved_ms(least=True) if item.legal else NEVER for item in choices]
    most = [item.saved_ms(least=False) if item.legal else NEVER for item in choices]
    prices = sorted({run.least_ms, run.most_ms})  # a low one speaks for a run, and for parting it
    against = [_cheapest(least, price, run.after_cpu_ms, False) for price in prices]
    either = [_cheapest(least, price, run.after_cpu_ms, True) for price in prices]
    towards = [_cheapest(most, price, 0.0, True) for price in prices]
    surely, tied = (tuple(map(all, zip(*ways, strict=True))) for ways in (against, either))
    possibly = tuple(map(any, zip(*towards, strict=True)))
    equal = tuple(b and not a for a, b in zip(surely, tied, strict=True))
    return Dispatch(surely, possibly, equal, tuple(_stretches(choices, least, most, run)))


@dataclass(frozen=True)
class _Way:
    """A way through the operations so far: what it saves, how many are on the engine, which."""

    saved_ms: float
    on_engine: int
    last: "_Way | None" = None
    engine: bool = False
    ran: bool = False

    def then(self, engine: bool, saved_ms: float) -> "_Way":
        return _Way(
            self.saved_ms + saved_ms,
            self.on_engine + engine,
            self,
            engine,
            self.ran or engine,
        )


def _cheapest(
    saved: Sequence[float], run_ms: float, after_cpu_ms: float, prefer_engine: bool, /
) -> tuple[bool, ...]:
    """Which operations are on the engine on the way that saves most; of equal ways, the one with
    most of them there, or fewest."""
    ways = [_Way(0.0, 0)]
    for index, gain in enumerate(saved):
        ahead = [way.then(False, 0.0) for way in ways]
        if gain > NEVER:
            for way in ways:
                price = 0.0 if way.engine else run_ms
                price += after_cpu_ms if index and not way.ran else 0.0
                ahead.append(way.then(True, gain - price))
        ways = [
            _best((way for way in ahead if (way.engine, way.ran) == state), prefer_engine)
            for state in {(way.engine, way.ran) for way in ahead}
        ]
    placed, at = [], _best(iter(ways), prefer_engine)
    while at.last:
        placed.append(at.engine)
        at = at.last
    return tuple(reversed(placed))


def _best(ways: Iterator[_Way], prefer_engine: bool) -> _Way:
    best = next(ways)
    for way in ways:
        more = way.saved_ms - best.saved_ms
        equal = abs(more) <= EQUAL_MS
        preferred = (way.on_engine > best.on_engine) == prefer_engine
        if more > EQUAL_MS or (equal and preferred and way.on_engine != best.on_engine):
            best = way
    return best


def _stretches(
    choices: Sequence[Choice], least: Sequence[float], most: Sequence[float], run: RunCost
) -> Iterator[Stretch]:
    numbered = groupby(range(len(choices)), key=lambda index: choices[index].legal)
    for legal, group in numbered:
        if not legal:
            continue
        indices = list(group)
        start, stop = indices[0], indices[-1] + 1
        first = [choices[index].estimates[0] for index in indices]
        counts = [choices[index].count for index in indices]
        after = run.after_cpu_ms if start else 0.0
        yield Stretch(
            start,
            stop,
            sum(item.ane_ms * count for item, count in zip(first, counts, strict=True)),
            sum(item.cpu_ms * count for item, count in zip(first, counts, strict=True)),
            (
                _best_run(least[start:stop]) - run.most_ms - after,
                _best_run(most[start:stop]) - run.least_ms,
            ),
        )


def _best_run(saved: Sequence[float]) -> float:
    """The largest sum over neighbours (Kadane)."""
    best = here = NEVER
    for gain in saved:
        here = max(here, 0.0) + gain
        best = max(best, here)
    return best
