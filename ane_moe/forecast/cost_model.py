"""How long a workload takes on a chip, as ranges. A prediction: nothing here runs anything.

A call takes as long as the slowest of streaming its weights from memory, working them off, and
computing; beside that, what a call costs, the passes over the KV states, and the host. Each part is
worked out for the fast end, the expected value and the slow end of the chip's figures. The parts
that share the memory system are added end by end; those of calls, host and loads are independent of
them, so their deviations are added in quadrature.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ane_moe.forecast.chips import SCENARIOS, Chip, Range, Scenario
from ane_moe.forecast.workload import Calls, ExpertTraffic, Workload, times

PARTS = ("weights", "compute", "calls", "kv", "head", "host", "loads")
# These share the memory system: fast or slow together.
TOGETHER = ("weights", "compute", "kv", "head")
PACKED = ("moe", "stack")  # many experts side by side in one call
EXPERT_CALLS = ("experts", "shared")  # calls the host dispatches one by one
NOTE = "predicted, not measured; it holds if Core ML places the shards on the Neural Engine"
Loop = Literal["tight", "naive"]


@dataclass(frozen=True)
class Breakdown:
    """One token's time, in ms, and its parts. Of a call that computes longer than it streams, the
    excess is `compute`; `head` is the head's streaming and computing (its calls are in `calls`);
    `loads` are experts not in memory."""

    per_token_ms: Range
    tok_s: Range
    parts: dict[str, Range]


@dataclass(frozen=True)
class Prediction:
    """`memory_bytes` with everything loaded; `load_seconds` warm, `first_load_seconds` with Core
    ML's compilation. `bound`: the part of decoding that rules."""

    chip: str
    loop: Loop
    decode: Breakdown
    prefill: Breakdown
    load_seconds: Range
    first_load_seconds: Range
    memory_bytes: Range
    bound: str
    note: str = NOTE

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, labelled as a prediction; every figure as low, expected, high."""
        return {"kind": "predicted", **asdict(self)}


def predict(
    workload: Workload, chip: Chip, *, traffic: ExpertTraffic | None = None, loop: Loop = "tight"
) -> Prediction:
    """Time, load and memory of `workload` on `chip`.

    `traffic` replaces the guess at expert calls by counts from a routing trace. `loop`: how calls
    are made (chips.toml). How much of the context is in use does not matter: a static graph goes
    over the whole cache.
    """
    decode = workload.decode if traffic is None else _with_traffic(workload.decode, traffic)
    loaded = 0.0 if traffic is None else traffic.bytes_loaded_per_token
    steps = workload.step_tokens
    one = breakdown(decode, chip, loop=loop, steps=steps, loaded_bytes=loaded)
    chunk = breakdown(workload.prefill, chip, loop=loop, steps=workload.prefill_tokens)
    return Prediction(
        chip=chip.name,
        loop=loop,
        decode=one,
        prefill=chunk,
        load_seconds=_seconds(workload.package_bytes, chip.range("load_gb_s")),
        first_load_seconds=_seconds(workload.package_bytes, chip.range("first_load_gb_s")),
        memory_bytes=memory(workload),
        bound=max(one.parts, key=lambda part: one.parts[part].expected),
    )


def breakdown(
    calls: tuple[Calls, ...],
    chip: Chip,
    *,
    loop: Loop = "tight",
    steps: int = 1,
    loaded_bytes: float = 0,
    host: bool = True,
) -> Breakdown:
    """The time of one step through `calls`, for each of its `steps` tokens. `host` False: without
    the token loop."""
    ends = {scenario: _parts(calls, chip, loop, loaded_bytes, scenario) for scenario in SCENARIOS}
    if not host:
        ends = {scenario: parts | {"host": 0.0} for scenario, parts in ends.items()}
    whole = _combined(ends, steps)
    parts = {
        part: _ordered(*(ends[scenario][part] / steps for scenario in SCENARIOS)) for part in PARTS
    }
    return Breakdown(whole, Range(1e3 / whole.high, 1e3 / whole.expected, 1e3 / whole.low), parts)


def memory(workload: Workload) -> Range:
    """Bytes with everything loaded. Functions of one package share weights on disk; that each wires
    a copy on the engine is reported (coremltools 2351, anemll-forge), so the low end has one copy
    and the others one for each function. Expert functions count once: theirs are seldom all
    loaded."""
    rest = workload.embed_bytes + workload.cache_bytes + workload.expert_bytes
    once = workload.package_bytes - workload.expert_bytes
    each = workload.functions * once + rest
    return Range(once + rest, each, each)


def _parts(
    calls: tuple[Calls, ...], chip: Chip, loop: Loop, loaded_bytes: float, scenario: Scenario
) -> dict[str, float]:
    """Milliseconds of each part."""
    parts = dict.fromkeys(PARTS, 0.0)
    call_ms = chip.range("call_ms" if loop == "tight" else "naive_call_ms").of_cost(scenario)
    bandwidth = chip.range("stream_gb_s").of_rate(scenario) * 1e6  # bytes in a ms
    for call in calls:
        count = call.count.of_cost(scenario)
        stream, excess = _call_ms(call, chip, scenario)
        parts["head" if call.kind == "lm_head" else "weights"] += count * stream
        parts["head" if call.kind == "lm_head" else "compute"] += count * excess
        parts["calls"] += count * call_ms
        parts["kv"] += (
            count * chip.range("kv_passes").of_cost(scenario) * call.cache_bytes / bandwidth
        )
        if call.kind in EXPERT_CALLS:
            parts["host"] += count * chip.range("expert_host_ms").of_cost(scenario)
    parts["host"] += chip.range("host_ms").of_cost(scenario)
    parts["loads"] = loaded_bytes / (chip.range("load_gb_s").of_rate(scenario) * 1e6)
    return parts


def _call_ms(call: Calls, chip: Chip, scenario: Scenario) -> tuple[float, float]:
    """Milliseconds of streaming, and of computing beyond them, of one call."""
    stream = call.stored_bytes / (chip.range("stream_gb_s").of_rate(scenario) * 1e6)
    if rate := chip.weights_per_second(call.rate):
        stream = max(stream, call.weights / (rate.of_rate(scenario) * 1e6))
    if call.tokens == 1:
        return stream, 0.0  # a row of a matrix is never bound by computing (ane-guide, chapter 11)
    share = chip.range("expert_compute_share").of_rate(scenario) if call.kind in PACKED else 1.0
    compute = (
        2
        * call.weights
        * call.tokens
        / (chip.range("compute_tflops").of_rate(scenario) * share * 1e9)
    )
    return stream, max(0.0, compute - stream)


def _combined(ends: dict[Scenario, dict[str, float]], steps: int) -> Range:
    together = Range(
        *(sum(ends[scenario][part] for part in TOGETHER) / steps for scenario in SCENARIOS)
    )
    apart = (
        Range(*(ends[scenario][part] / steps for scenario in SCENARIOS))
        for part in PARTS
        if part not in TOGETHER
    )
    groups = [together, *apart]
    expected = sum(group.expected for group in groups)
    low = math.sqrt(sum((group.expected - group.low) ** 2 for group in groups))
    high = math.sqrt(sum((group.high - group.expected) ** 2 for group in groups))
    return Range(expected - low, expected, expected + high)


def _ordered(fast: float, expected: float, slow: float) -> Range:
    """A part's range: where streaming slows down, less of the computing exceeds it, so the ends of
    an excess can change places."""
    return Range(min(fast, expected, slow), expected, max(fast, expected, slow))


def _with_traffic(calls: tuple[Calls, ...], traffic: ExpertTraffic) -> tuple[Calls, ...]:
    """The same calls, but those of experts as often as was counted."""
    guessed = sum(call.count.expected for call in calls if call.kind == "experts")
    factor = traffic.functions_per_token / guessed if guessed else 0.0
    return tuple(_counted(call, factor) if call.kind == "experts" else call for call in calls)


def _counted(call: Calls, factor: float) -> Calls:
    count = times(call.count, factor).expected
    return Calls(**{**vars(call), "count": Range(count, count, count)})


def _seconds(size: int, rate: Range) -> Range:
    return Range(size / rate.high / 1e9, size / rate.expected / 1e9, size / rate.low / 1e9)
