"""What caches of experts would do with a trace: by the policy that drops, the capacity, and the
guesses by which experts are loaded ahead.

Hits and bytes are arithmetic on the trace; waiting is played through on a machine of assumed speeds
(`forecast/streaming.py`). N = tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ane_moe.forecast.streaming import Timeline
from ane_moe.loop.eviction import DEFAULT_POLICY, POLICIES
from ane_moe.loop.prefetch import LayerBefore, MostUsed, Predictor, PreviousToken
from ane_moe.progress import Progress, silent
from ane_moe.routing.heard import Heard, HiddenStates
from ane_moe.routing.routing_trace import RoutingTrace
from ane_moe.routing.traffic import BELADY, FunctionCalls, PlayedCache, function_calls

Guesses = Sequence[Sequence[int]]  # functions that each layer of each token is guessed to call

SHARES = (0.125, 0.25, 0.5, 1.0)  # of all experts' bytes

# name -> guesses by what came before; takes how many experts each layer has
PREDICTORS: dict[str, Callable[[Mapping[int, int]], Predictor]] = {
    "static": MostUsed,
    "previous": lambda experts: PreviousToken(),
    "layer": LayerBefore,
}
PERFECT = "perfect"  # guesses that are what will be


@dataclass(frozen=True)
class Machine:
    """Assumed speeds. A layer computes for `compute_ms`; reading an expert takes `latency_ms` and
    its bytes at `read_gb_s` (10^9 bytes a second), for each of `readers` at once, and of
    `ahead_readers` for guesses (None: as many); the disk serves `channels` (None: as many as
    readers). `contention`: computing takes 1 + so much as long while something is read ahead."""

    compute_ms: float = 1.0
    read_gb_s: float = 3.0
    latency_ms: float = 0.1
    readers: int = 4
    contention: float = 0.0
    ahead_readers: int | None = None
    channels: int | None = None

    def read_ms(self, size: int) -> float:
        return self.latency_ms + size / self.read_gb_s / 1e6


@dataclass(frozen=True)
class CacheRow:
    """Decoding the trace by one cache. `late` calls find their function still being read.
    `of_belady` is the share of the hits that the policy with foresight has in a cache of this size,
    without guesses; None where it has none. Figures per token are means."""

    policy: str
    predictor: str
    cache_bytes: int
    share: float  # of all experts' bytes
    hits: int
    late: int
    misses: int
    bytes_loaded_per_token: float
    bytes_unused_per_token: float  # loaded ahead, and never called
    stalled_ms_per_token: float
    ms_per_token: float
    of_belady: float | None = None

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.late + self.misses)


@dataclass(frozen=True)
class CacheStudy:
    """`compulsory` is how many functions are called at all: what misses in any cache."""

    family: str
    source: str
    tokens: int
    layers: int
    expert_bytes: int
    compulsory: int
    machine: Machine
    rows: tuple[CacheRow, ...]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        document = asdict(self)
        document["kind"] = "played through a trace; times are of an assumed machine"
        for entry, row in zip(document["rows"], self.rows, strict=True):
            entry["hit_rate"] = row.hit_rate
        return document


def study(
    trace: RoutingTrace,
    machine: Machine,
    *,
    shares: Sequence[float] = SHARES,
    guess_policy: str = DEFAULT_POLICY,
    heard: Heard | None = None,
    progress: Progress = silent,
) -> CacheStudy:
    """Play the trace through every policy at every capacity, and under `guess_policy` with every
    predictor, those of `heard` among them.

    Raises UserError when the trace does not say what experts take, a cache is smaller than one of
    them, and for an unknown policy.
    """
    calls = function_calls(trace)
    total = int(calls.sizes.sum())
    guesses: dict[str, Guesses | None] = {"none": None}
    experts = {layer: one.experts for layer, one in trace.layers.items()}
    guesses |= {name: guessed(calls, make(experts)) for name, make in PREDICTORS.items()}
    if heard:
        hidden = heard.entering
        guesses |= {name: guessed(calls, one, hidden) for name, one in heard.predictors.items()}
    guesses[PERFECT] = [functions for _, functions in calls]
    plays = [(share, policy, "none") for share in shares for policy in (BELADY, *POLICIES)]
    plays += [(share, guess_policy, name) for share in shares for name in guesses if name != "none"]
    rows: list[CacheRow] = []
    for number, (share, policy, name) in enumerate(plays):
        progress("playing caches through", number, len(plays))
        rows.append(play(calls, int(share * total), policy, machine, name, guesses[name]))
    best = {row.cache_bytes: row.hits for row in rows if row.policy == BELADY}
    compared = (
        replace(row, of_belady=row.hits / best[row.cache_bytes] if best[row.cache_bytes] else None)
        for row in rows
    )
    layers = len(calls.touched)
    called = sum(int(touched.any(0).sum()) for _, touched in calls.touched)
    return CacheStudy(
        trace.family,
        trace.source,
        calls.tokens,
        layers,
        total,
        called,
        machine,
        tuple(compared),
    )


def guessed(
    calls: FunctionCalls, predictor: Predictor, hidden: HiddenStates | None = None
) -> Guesses:
    """What a predictor names for each layer of each token, as they run, knowing what ran before:
    `hidden` states as each layer's experts add to them, or, of predictors that ask only whether
    there is one, none."""
    nothing = np.zeros((calls.tokens, 0), np.float32)
    known = hidden or {layer: nothing for layer, _ in calls.touched}
    last, before, token = calls.touched[-1][0], None, 0
    guesses: list[list[int]] = []
    for layer, functions in calls:
        first = calls.firsts[layer]
        entering = known[before][token] if before is not None else None
        guesses.append([first + expert for expert in predictor.predict(layer, entering)])
        predictor.observe(layer, [function - first for function in functions])
        before, token = (None, token + 1) if layer == last else (layer, token)
    return guesses


def play(
    calls: FunctionCalls,
    cache_bytes: int,
    policy: str,
    machine: Machine,
    predictor: str = "none",
    guesses: Guesses | None = None,
) -> CacheRow:
    """One cache. `guesses` are known when the layer before begins; None: nothing is loaded
    ahead."""
    calls.require_room(cache_bytes)
    player = _Player(calls, PlayedCache(cache_bytes, calls.sizes, calls.policy(policy)), machine)
    ahead = iter(guesses or ())
    next(ahead, None)  # nothing precedes the first layer
    for layer, functions in calls:
        player.layer(layer, functions, next(ahead, ()))
    cache, line, tokens = player.cache, player.line, calls.tokens
    return CacheRow(
        policy,
        predictor,
        cache_bytes,
        cache_bytes / int(calls.sizes.sum()),
        player.hits,
        player.late,
        player.misses,
        cache.loaded / tokens,
        player.unused_bytes / tokens,
        line.stalled / tokens,
        line.now / tokens,
    )


class _Player:
    """Plays layer by layer: a cache, and the machine that reads into it."""

    def __init__(self, calls: FunctionCalls, cache: PlayedCache, machine: Machine) -> None:
        self.cache = cache
        ahead = machine.ahead_readers or machine.readers
        self.line = Timeline(machine.readers, ahead, machine.channels, machine.contention)
        self.hits = self.late = self.misses = 0
        self.unused: set[int] = set()  # loaded ahead, and not called yet
        self.wasted = 0  # bytes that left so
        self._compute_ms = machine.compute_ms
        self._sizes = calls.sizes.tolist()
        self._read_ms = [machine.read_ms(size) for size in calls.sizes.tolist()]

    @property
    def unused_bytes(self) -> int:
        """Loaded ahead, and never called."""
        return self.wasted + sum(self._sizes[function] for function in self.unused)

    def layer(self, number: int, functions: Sequence[int], guesses: Sequence[int]) -> None:
        """It calls `functions`; `guesses` are those of the layer after it."""
        self.cache.begin(number, functions)
        there = [function for function in functions if self.cache.held[function]]
        late = set(there).intersection(self.line.on_their_way)
        missing = [function for function in functions if not self.cache.held[function]]
        self.hits += len(there) - len(late)
        self.late += len(late)
        self.misses += len(missing)
        for function in missing:
            self._load(function)
        for function in functions:
            self.cache.used(function)
        self.unused.difference_update(functions)
        self._protect(functions, guesses)
        self.line.load_ahead(
            [(one, self._read_ms[one]) for one in guesses if not self.cache.held[one]], self._admit
        )
        self.line.need([(one, self._read_ms[one]) for one in missing], late)
        self.line.compute(self._compute_ms)

    def _load(self, function: int) -> None:
        """What is on its way cannot leave; where it takes all room, it is waited for."""
        nothing = np.zeros(len(self._sizes), bool)
        if not self._enter(function, self._moving(nothing)):
            self.line.need((), self.line.on_their_way)
            self._enter(function, nothing)

    def _protect(self, functions: Sequence[int], guesses: Sequence[int]) -> None:
        self._kept = np.zeros(len(self._sizes), bool)
        self._kept[[*functions, *guesses]] = True

    def _admit(self, function: int) -> bool:
        if self.cache.held[function] or not self._enter(function, self._moving(self._kept)):
            return False
        self.unused.add(function)
        return True

    def _moving(self, kept: np.ndarray) -> np.ndarray:
        moving = self.line.on_their_way
        if moving:
            kept = kept.copy()
            kept[moving] = True
        return kept

    def _enter(self, function: int, kept: np.ndarray) -> bool:
        left = self.cache.enter(function, kept)
        gone = self.unused.intersection(left or ())
        self.wasted += sum(self._sizes[one] for one in gone)
        self.unused -= gone
        return left is not None
