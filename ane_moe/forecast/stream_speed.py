"""How fast a model decodes whose experts lie in a store. A prediction: nothing here runs anything.

Each layer computes as the cost model says, and waits for what is missing as `LayerTimes` does,
which `forecast/streaming.py` plays through event by event; with guesses it is that play. k =
experts of a token in a layer.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ane_moe.forecast.chips import SCENARIOS, Chip, Range
from ane_moe.forecast.cost_model import breakdown
from ane_moe.forecast.early_cost import EarlyCost
from ane_moe.forecast.streaming import simulate
from ane_moe.forecast.workload import Calls, Workload
from ane_moe.loop.ahead_rule import CONTENTION
from ane_moe.loop.expert_store import READERS
from ane_moe.loop.layer_times import LayerTimes

READ_GB_S = 3.0  # a disk of today's laptops; Flash-MoE reads 17.5 on an M3 Max


@dataclass(frozen=True)
class Reading:
    """What is assumed: the disk gives `gb_s` (10^9 bytes a second) to so many reads at once as the
    store's readers do, and to one its share. `hit_rate`: of the experts that tokens call, those in
    memory (None: as many as of all experts are, as if all were called alike). `recall`: of those
    that a layer calls, what attention shards name a layer before (None: nothing is asked of
    them)."""

    gb_s: float = READ_GB_S
    hit_rate: float | None = None
    recall: float | None = None


ASSUMED = Reading()


@dataclass(frozen=True)
class StreamSpeed:
    """Decoding on demand, nothing loaded ahead: `tok_s`, and were everything in memory; ms that a
    token waits for experts. `early_tok_s`: with what shards guess loaded ahead."""

    tok_s: Range
    in_memory_tok_s: Range
    stalled_ms: float
    read_gb_s: float
    hit_rate: float
    early_tok_s: Range | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, labelled as a prediction."""
        return {"kind": "predicted", "assumed": ["read_gb_s", "hit_rate"], **asdict(self)}


def stream_speed(
    workload: Workload,
    chip: Chip,
    read_bytes: int,
    layers: int,
    k: float,
    reading: Reading,
    early: EarlyCost | None = None,
) -> StreamSpeed:
    """A token calls k experts in each of so many `layers`, `read_bytes` in all as stored; the hit
    rate is given."""
    assert reading.hit_rate is not None
    once = breakdown(tuple(_as_fp16(call) for call in workload.decode), chip)
    read_ms = READERS * read_bytes / (layers * k) / reading.gb_s / 1e6
    waits = LayerTimes(0.0, read_ms, round(k), readers=READERS)
    stalled = layers * waits.on_demand_ms(reading.hit_rate)
    ms = once.per_token_ms
    speed = _tok_s(ms.low + stalled, ms.expected + stalled, ms.high + stalled)
    ahead = None
    if early and reading.recall is not None:
        ahead = _tok_s(*_with_guesses(ms, waits, layers, reading, early))
    facts = (stalled, reading.gb_s, reading.hit_rate, ahead)
    return StreamSpeed(speed, once.tok_s, *facts)


def _with_guesses(
    own_ms: Range, waits: LayerTimes, layers: int, reading: Reading, early: EarlyCost
) -> Iterator[float]:
    """Ms of a token, fast, as expected and slow: where reading ahead slows nothing, and where it
    does by CONTENTION. One expert is read ahead at a time, as by the cache."""
    assert reading.hit_rate is not None
    for end in SCENARIOS:
        own = own_ms.of_cost(end) / layers
        times = replace(waits, compute_ms=own, contention=0.0 if end == "fast" else CONTENTION)
        played = simulate(times, layers, accuracy=reading.recall, resident=reading.hit_rate)
        yield early.token_ms.of_cost(end) + played.token_ms


def _tok_s(fast_ms: float, expected_ms: float, slow_ms: float) -> Range:
    return Range(1e3 / slow_ms, 1e3 / expected_ms, 1e3 / fast_ms)


def _as_fp16(call: Calls) -> Calls:
    """Experts are expanded when they are read; their graph takes fp16."""
    if call.kind != "experts":
        return call
    return replace(call, stored_bytes=2 * call.weights, rate="fp16")
