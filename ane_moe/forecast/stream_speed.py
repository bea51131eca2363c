"""How fast a model decodes whose experts lie in a store. A prediction: nothing here runs anything.

Each layer computes as the cost model says, and waits for what is missing as `LayerTimes` does,
which `forecast/streaming.py` plays through event by event. k = experts of a token in a layer.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from ane_moe.forecast.chips import Chip, Range
from ane_moe.forecast.cost_model import breakdown
from ane_moe.forecast.workload import Calls, Workload
from ane_moe.loop.expert_store import READERS
from ane_moe.loop.layer_times import LayerTimes

READ_GB_S = 3.0  # a disk of today's laptops; Flash-MoE reads 17.5 on an M3 Max


@dataclass(frozen=True)
class Reading:
    """What is assumed: the disk gives `gb_s` (10^9 bytes a second) to so many reads at once as the
    store's readers do, and to one its share. `hit_rate`: of the experts that tokens call, those in
    memory (None: as many as of all experts are, as if all were called alike)."""

    gb_s: float = READ_GB_S
    hit_rate: float | None = None


ASSUMED = Reading()


@dataclass(frozen=True)
class StreamSpeed:
    """Decoding on demand, nothing loaded ahead: `tok_s`, and were everything in memory; ms that a
    token waits for experts."""

    tok_s: Range
    in_memory_tok_s: Range
    stalled_ms: float
    read_gb_s: float
    hit_rate: float

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, labelled as a prediction."""
        return {"kind": "predicted", "assumed": ["read_gb_s", "hit_rate"], **asdict(self)}


def stream_speed(
    workload: Workload,
    chip: Chip,
    read_bytes: int,
    layers: int,
    k: float,
    hit_rate: float,
    gb_s: float,
) -> StreamSpeed:
    """A token calls k experts in each of so many `layers`, `read_bytes` in all as stored."""
    once = breakdown(tuple(_as_fp16(call) for call in workload.decode), chip)
    read_ms = READERS * read_bytes / (layers * k) / gb_s / 1e6
    waits = LayerTimes(0.0, read_ms, round(k), readers=READERS)
    stalled = layers * waits.on_demand_ms(hit_rate)
    ms = (once.per_token_ms.low, once.per_token_ms.expected, once.per_token_ms.high)
    fast, expected, slow = (1e3 / (own + stalled) for own in ms)
    return StreamSpeed(Range(slow, expected, fast), once.tok_s, stalled, gb_s, hit_rate)


def _as_fp16(call: Calls) -> Calls:
    """Experts are expanded when they are read; their graph takes fp16."""
    if call.kind != "experts":
        return call
    return replace(call, stored_bytes=2 * call.weights, rate="fp16")
