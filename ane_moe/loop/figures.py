"""Where the time of a session goes: the shards' own time, waiting for experts to load, and the
host's share."""

import threading
from dataclasses import asdict, dataclass, field
from time import perf_counter


@dataclass
class KindFigures:
    """Calls of one shard kind and the seconds spent inside them (added up, also where they
    overlapped)."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class PhaseFigures:
    """One phase (prefill or decode). `seconds` is wall time; `shard_seconds` the part with a shard
    call running, `load_seconds` the part spent waiting for expert functions to load, the rest is
    the host's own. `synchronisations`: how often tracks met. `copies`: arrays that the host copied,
    of `copied_bytes`; `most_at_once`: calls that ran side by side."""

    tokens: int = 0
    seconds: float = 0.0
    shard_seconds: float = 0.0
    load_seconds: float = 0.0
    kinds: dict[str, KindFigures] = field(default_factory=dict)
    synchronisations: int = 0
    copies: int = 0
    copied_bytes: int = 0
    most_at_once: int = 0

    @property
    def copies_per_token(self) -> float:
        return self.copies / self.tokens if self.tokens else 0.0

    @property
    def calls(self) -> int:
        return sum(kind.calls for kind in self.kinds.values())

    @property
    def host_seconds(self) -> float:
        return max(0.0, self.seconds - self.shard_seconds - self.load_seconds)

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def calls_per_token(self) -> float:
        return self.calls / self.tokens if self.tokens else 0.0

    @property
    def host_ms_per_call(self) -> float:
        return 1000 * self.host_seconds / self.calls if self.calls else 0.0

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON, units in the names."""
        return {
            "tokens": self.tokens,
            "calls": self.calls,
            "synchronisations": self.synchronisations,
            "tok_s": self.tok_s,
            "calls_per_token": self.calls_per_token,
            "seconds": self.seconds,
            "shard_seconds": self.shard_seconds,
            "load_seconds": self.load_seconds,
            "host_seconds": self.host_seconds,
            "host_ms_per_call": self.host_ms_per_call,
            "copies_per_token": self.copies_per_token,
            "copied_bytes": self.copied_bytes,
            "most_at_once": self.most_at_once,
            "kinds": {
                name: {"calls": kind.calls, "seconds": kind.seconds}
                for name, kind in self.kinds.items()
            },
        }


@dataclass
class CacheFigures:
    """The cache of expert functions. A call finds its function loaded (hit), being loaded ahead
    (late) or not at all (miss). `bytes_unused` were loaded ahead and dropped, or still wait,
    without one call."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    bytes_unused: int = 0
    bytes_resident: int = 0
    bytes_peak: int = 0
    wait_seconds: float = 0.0
    loads: int = 0  # finished, and what they took, added up
    load_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        calls = self.hits + self.late + self.misses
        return self.hits / calls if calls else 0.0


@dataclass
class PrefetchFigures:
    """How good a predictor was in decode: of `needed` experts `right` had been named, among
    `predicted` ones. Guesses for `withheld` layers were not loaded, since it would not pay."""

    predictor: str
    needed: int = 0
    predicted: int = 0
    right: int = 0
    withheld: int = 0

    @property
    def hit_rate(self) -> float:
        return self.right / self.needed if self.needed else 0.0


@dataclass
class SpeculationFigures:
    """Tokens drafted after `exit_layer`, and those `accepted` that the whole model chose too; it
    was called once in each of the `rounds`."""

    exit_layer: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_round(self) -> float:
        """Accepted length: the token that began the round, and the drafts that were right."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0


@dataclass
class RosterFigures:
    """Of tokens that were taken several times at once: how many, and the distinct experts that all
    their samples chose, over all layers."""

    samples: int
    layers: int
    tokens: int = 0
    experts: int = 0

    @property
    def experts_per_layer(self) -> float:
        """Distinct experts of a layer for a token: what sparse routing calls."""
        return self.experts / (self.tokens * self.layers) if self.tokens else 0.0


@dataclass
class PinFigures:
    """So many `experts` of a layer were all that tokens might use, which changes the model: of the
    experts that they had `chosen` so many were `kept`."""

    experts: int
    selections: int = 0
    chosen: int = 0
    kept: int = 0


@dataclass
class Figures:
    """What a session has done since it was made. `runtime` says which runtime the times are for;
    `cache` is shared by all sessions over the same shards."""

    runtime: str
    prefill: PhaseFigures = field(default_factory=PhaseFigures)
    decode: PhaseFigures = field(default_factory=PhaseFigures)
    cache: CacheFigures | None = None
    prefetch: PrefetchFigures | None = None
    speculation: SpeculationFigures | None = None
    roster: RosterFigures | None = None
    pinned: PinFigures | None = None


class CallClock:
    """Divides wall time among shard calls and waits for loads, also when several threads run them.

    Time with at least one call running is shard time, however many overlap; else time with at least
    one wait is load time.
    """

    def __init__(self, phase: PhaseFigures) -> None:
        self.phase = phase
        self._lock = threading.Lock()
        self._calls = 0
        self._loads = 0
        self._since = 0.0

    def start(self) -> float:
        """Note that a call begins; hand the returned time to `stop`."""
        with self._lock:
            now = self._divide()
            self._calls += 1
            self.phase.most_at_once = max(self.phase.most_at_once, self._calls)
        return now

    def stop(self, kind: str, started: float) -> None:
        with self._lock:
            now = self._divide()
            self._calls -= 1
            figures = self.phase.kinds.setdefault(kind, KindFigures())
            figures.calls += 1
            figures.seconds += now - started

    def copied(self, nbytes: int) -> None:
        """Note that the host has copied an array."""
        with self._lock:
            self.phase.copies += 1
            self.phase.copied_bytes += nbytes

    def start_load(self) -> None:
        with self._lock:
            self._divide()
            self._loads += 1

    def stop_load(self) -> None:
        with self._lock:
            self._divide()
            self._loads -= 1

    def _divide(self) -> float:
        now = perf_counter()
        if self._calls:
            self.phase.shard_seconds += now - self._since
        elif self._loads:
            self.phase.load_seconds += now - self._since
        self._since = now
        return now


# What a runtime's times are times of, so that nobody takes one for another.
CONDITIONS = {
    "reference": "reference runtime on this machine's CPU, not a Neural Engine speed",
    "coreml": "Core ML on this machine",
    "coreai": "Core AI's runtime on this machine's CPU, not a Neural Engine speed",
}


# Who guesses experts, where the predictor's name alone does not say.
BY = {"shard": "by the shards", "previous": "by the previous token", "static": "by most used"}


def conditions(runtime: str) -> str:
    return CONDITIONS.get(runtime, f"{runtime} runtime")


def figures_dict(figures: Figures) -> dict[str, object]:
    """The figures as one JSON object; host time per call is over both phases."""
    prefill, decode = figures.prefill, figures.decode
    calls = prefill.calls + decode.calls
    host = prefill.host_seconds + decode.host_seconds
    return {
        "runtime": figures.runtime,
        "conditions": conditions(figures.runtime),
        "prefill_tok_s": prefill.tok_s,
        "decode_tok_s": decode.tok_s,
        "calls_per_token": decode.calls_per_token,
        "host_ms_per_call": 1000 * host / calls if calls else 0.0,
        "prefill": prefill.as_dict(),
        "decode": decode.as_dict(),
        "cache": asdict(figures.cache) | {"hit_rate": figures.cache.hit_rate}
        if figures.cache
        else None,
        "prefetch": asdict(figures.prefetch) | {"hit_rate": figures.prefetch.hit_rate}
        if figures.prefetch
        else None,
        "speculation": asdict(figures.speculation)
        | {"tokens_per_round": figures.speculation.tokens_per_round}
        if figures.speculation
        else None,
        "roster": asdict(figures.roster) | {"experts_per_layer": figures.roster.experts_per_layer}
        if figures.roster
        else None,
        "pinned": asdict(figures.pinned) if figures.pinned else None,
    }


def figures_line(figures: Figures) -> str:
    """One line for people, naming the runtime it is for."""
    prefill, decode = figures.prefill, figures.decode
    parts = [
        f"prefill {prefill.tokens} tokens at {prefill.tok_s:.1f} tok/s, "
        f"host {prefill.host_ms_per_call:.3f} ms per call"
    ]
    if decode.tokens:
        parts.append(
            f"decode {decode.tokens} tokens at {decode.tok_s:.1f} tok/s, "
            f"{decode.calls_per_token:.1f} calls "
            f"per token, host {decode.host_ms_per_call:.3f} ms per call"
        )
    if figures.roster:
        parts.append(
            f"roster of {figures.roster.samples}, {figures.roster.experts_per_layer:.2f} distinct "
            "experts a layer and token"
        )
    if figures.cache:
        parts.append(
            f"expert cache {100 * figures.cache.hit_rate:.0f}% hits, "
            f"{figures.cache.bytes_loaded / 1e6:.1f} MB loaded, {figures.cache.wait_seconds:.2f} "
            f"s waited"
        )
    if (guesses := figures.prefetch) and guesses.needed:
        parts.append(
            f"guesses {BY.get(guesses.predictor, f'by {guesses.predictor}')}: "
            f"{guesses.right} of {guesses.needed} experts"
        )
    if own := figures.speculation:
        parts.append(
            f"{own.accepted} of {own.drafted} drafts of layer {own.exit_layer} accepted, "
            f"{own.tokens_per_round:.2f} tokens per round"
        )
    if pinned := figures.pinned:
        parts.append(
            f"ANOTHER MODEL: {pinned.experts} experts of a layer pinned, {pinned.kept} of "
            f"{pinned.chosen} choices kept"
        )
    return f"{'; '.join(parts)} [{conditions(figures.runtime)}]"
