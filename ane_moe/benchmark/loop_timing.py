"""The whole token loop, timed: decode at several context fills, prefill at several lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from time import perf_counter

import numpy as np

from ane_moe.benchmark.result import CacheTiming, LoopTiming, latency
from ane_moe.errors import UserError
from ane_moe.loop.figures import CacheFigures, PhaseFigures
from ane_moe.loop.labels import Labeller
from ane_moe.loop.session import Session
from ane_moe.manifest import Manifest
from ane_moe.progress import Progress

PREFILL_RUNS = 3
LENGTHS = (1, 4, 16)  # of prompts, in calls of T tokens
FILLS = (0.0, 0.25, 0.5)  # of the context, and the end of it


def default_fills(manifest: Manifest, tokens: int, warmup: int) -> tuple[int, ...]:
    """Context fills to decode at: empty, a quarter, half, and as full as leaves room for the
    tokens."""
    end = manifest.context - tokens - warmup
    return tuple(
        sorted(
            {
                *(
                    int(share * manifest.context)
                    for share in FILLS
                    if share * manifest.context <= end
                ),
                max(end, 0),
            }
        )
    )


def default_lengths(manifest: Manifest) -> tuple[int, ...]:
    """Prompt lengths: 1, 4 and 16 prefill calls, as far as they fit."""
    call = manifest.prefill or 1
    return tuple(call * calls for calls in LENGTHS if call * calls <= manifest.context) or (
        manifest.context,
    )


def time_decode(
    session: Session,
    ids: Sequence[int],
    fills: Sequence[int],
    tokens: int,
    warmup: int,
    progress: Progress,
) -> Iterator[LoopTiming]:
    """Greedy tokens one by one after `fill` tokens of the text `ids` (again and again); choosing
    the token is part of the time. Raises UserError when a fill leaves no room for them."""
    _require_room(session, [fill + tokens + warmup for fill in fills])
    session.reset()
    for number, fill in enumerate(sorted(fills)):
        progress(f"decode after {fill} tokens", number, len(fills))
        if session.position > fill:
            session.reset()
        text = list(islice(cycle(ids), fill + 1))
        if fill > session.position:
            session.prefill(text[session.position : fill])
        yield _time_tokens(session, fill, text[fill], tokens, warmup)


def _time_tokens(
    session: Session, fill: int, identifier: int, tokens: int, warmup: int
) -> LoopTiming:
    for _ in range(warmup):
        identifier = int(np.argmax(session.decode(identifier)))
    before = _snapshot(session)
    seconds = []
    for _ in range(tokens):
        started = perf_counter()
        identifier = int(np.argmax(session.decode(identifier)))
        seconds.append(perf_counter() - started)
    return _row(session, fill, tokens, 1, sum(seconds), seconds, session.figures.decode, before)


def time_prefill(
    session: Session, ids: Sequence[int], lengths: Sequence[int], runs: int, progress: Progress
) -> Iterator[LoopTiming]:
    """Prompts of the text `ids` (again and again) into an empty context, up to the last token's
    logits; one run before those that count. Raises UserError when a length does not fit the
    context."""
    _require_room(session, lengths)
    for number, length in enumerate(lengths):
        progress(f"prefill of {length} tokens", number, len(lengths))
        text = list(islice(cycle(ids), length))
        session.reset()
        session.prefill(text)
        before = _snapshot(session)
        seconds = []
        for _ in range(runs):
            session.reset()
            started = perf_counter()
            session.prefill(text)
            seconds.append(perf_counter() - started)
        yield _row(session, 0, length, runs, sum(seconds), seconds, session.figures.prefill, before)
    session.reset()


def time_windows(
    labeller: Labeller, ids: Sequence[int], lengths: Sequence[int], runs: int, progress: Progress
) -> Iterator[LoopTiming]:
    """Windows of the text `ids` (again and again) that fill an encoder's functions for each of
    `lengths`; one run before those that count."""
    for number, length in enumerate(lengths):
        progress(f"window of {length} tokens", number, len(lengths))
        text = list(islice(cycle(ids), length))
        labeller.logits(text, length)
        before = _copy(labeller.figures), _cache_copy(labeller.cache_figures)
        seconds = []
        for _ in range(runs):
            started = perf_counter()
            labeller.logits(text, length)
            seconds.append(perf_counter() - started)
        after = labeller.figures, labeller.cache_figures
        yield _timing(0, length, runs, sum(seconds), seconds, after, before)


def _require_room(session: Session, needed: Sequence[int]) -> None:
    if wrong := [count for count in needed if not 0 < count <= session.manifest.context]:
        raise UserError(
            "the tokens to time do not fit into the context",
            f"{wrong[0]} tokens, warm-up included, for a context of {session.manifest.context}",
            "give smaller --fills, --lengths or --tokens, or convert with a larger --context",
        )


# Decode, prefill and cache figures so far: a session only ever adds to them.
_Snapshot = tuple[PhaseFigures, PhaseFigures, CacheFigures | None]
_Phase = tuple[PhaseFigures, CacheFigures | None]


def _snapshot(session: Session) -> _Snapshot:
    figures = session.figures
    return _copy(figures.decode), _copy(figures.prefill), _cache_copy(figures.cache)


def _cache_copy(cache: CacheFigures | None) -> CacheFigures | None:
    return CacheFigures(**asdict(cache)) if cache else None


def _copy(phase: PhaseFigures) -> PhaseFigures:
    kinds = {name: type(kind)(kind.calls, kind.seconds) for name, kind in phase.kinds.items()}
    return replace(phase, kinds=kinds)


def _row(
    session: Session,
    fill: int,
    tokens: int,
    runs: int,
    wall: float,
    seconds: list[float],
    after: PhaseFigures,
    before: _Snapshot,
) -> LoopTiming:
    earlier = before[0] if after is session.figures.decode else before[1]
    now, then = (after, session.figures.cache), (earlier, before[2])
    return _timing(fill, tokens, runs, wall, seconds, now, then)


def _timing(
    fill: int,
    tokens: int,
    runs: int,
    wall: float,
    seconds: list[float],
    now: _Phase,
    then: _Phase,
) -> LoopTiming:
    """The row of what happened between `then` and `now`: `runs` times `tokens` in `wall`
    seconds."""
    (after, cache), (earlier, earlier_cache) = now, then
    each = 1000 / (tokens * runs)
    kinds = {
        name: each * (kind.seconds - (earlier.kinds[name].seconds if name in earlier.kinds else 0))
        for name, kind in after.kinds.items()
    }
    inside = after.shard_seconds - earlier.shard_seconds
    waiting = after.load_seconds - earlier.load_seconds
    calls = after.calls - earlier.calls
    return LoopTiming(
        fill=fill,
        tokens=tokens,
        tok_s=tokens * runs / wall,
        latency=latency(seconds),
        calls_per_token=calls / (tokens * runs),
        kinds_ms=kinds,
        load_ms=each * waiting,
        host_ms=each * max(0.0, wall - inside - waiting),
        gap_ms=1000 * max(0.0, wall - inside) / calls if calls else 0.0,
        cache=_cache(cache, earlier_cache),
        synchronisations_per_token=(after.synchronisations - earlier.synchronisations)
        / (tokens * runs),
    )


def _cache(after: CacheFigures | None, before: CacheFigures | None) -> CacheTiming | None:
    if after is None or before is None:
        return None
    hits, late, misses = (
        after.hits - before.hits,
        after.late - before.late,
        after.misses - before.misses,
    )
    calls = hits + late + misses
    return CacheTiming(
        hits,
        late,
        misses,
        hits / calls if calls else 0.0,
        after.bytes_loaded - before.bytes_loaded,
        after.bytes_resident,
    )
