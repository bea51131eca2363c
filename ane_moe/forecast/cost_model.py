"""How long a workload takes on a chip, as ranges. A prediction: nothing here runs anything.

A call takes as long as the slowest of streaming its weights from memory, working them off, and
computing; beside that, the passes over the KV states, what a call costs before and after its task
(the longer a task, the more), the lower clock of an engine that waits for the host, and the host.
Each part is worked out for the fast end, the expected value and the slow end of the chip's figures.
The parts that share the memory system are added end by end; those of calls, clock, host and loads
are independent of them, so their deviations are added in quadrature.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ane_moe.forecast.chips import SCENARIOS, Chip, Range, Scenario
from ane_moe.forecast.compile_time import compile_seconds
from ane_moe.forecast.engine_speed import (
    FP16_BITS,
    after_task_ms,
    clock_factor,
    share_of_fp16,
)
from ane_moe.forecast.workload import Calls, ExpertTraffic, Workload, add, times

PARTS = ("weights", "compute", "calls", "kv", "head", "clock", "host", "loads")
# These share the memory system: fast or slow together.
TOGETHER = ("weights", "compute", "kv", "head")
PACKED = ("moe", "stack", "track")  # many experts side by side in one call
AT_ONCE = ("experts", "track")  # calls that know nothing of each other
EXPERT_CALLS = ("experts", "shared")  # calls the host dispatches one by one
NOTE = "predicted, not measured; it holds if Core ML places the shards on the Neural Engine"
Loop = Literal["tight", "naive"]


@dataclass(frozen=True)
class Breakdown:
    """One token's time, in ms, and its parts. Of a call that computes longer than it streams, the
    excess is `compute`; `head` is the head's streaming and computing (its calls are in `calls`);
    `clock` is what an engine that clocks down between calls adds; `loads` are experts not in
    memory."""

    per_token_ms: Range
    tok_s: Range
    parts: dict[str, Range]


@dataclass(frozen=True)
class Prediction:
    """`memory_bytes` with everything loaded; `load_seconds` warm, `first_load_seconds` with Core
    ML's compilation. `tokens_per_joule`: of decoding, for the whole machine. `bound`: the part of
    decoding that rules."""

    chip: str
    loop: Loop
    decode: Breakdown
    prefill: Breakdown
    load_seconds: Range
    first_load_seconds: Range
    memory_bytes: Range
    tokens_per_joule: Range
    bound: str
    note: str = NOTE

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, labelled as a prediction; every figure as low, expected, high."""
        return {"kind": "predicted", **asdict(self)}


def predict(
    workload: Workload,
    chip: Chip,
    *,
    traffic: ExpertTraffic | None = None,
    loop: Loop = "tight",
    concurrency: int = 1,
) -> Prediction:
    """Time, load and memory of `workload` on `chip`.

    `traffic` replaces the guess at expert calls by counts from a routing trace. `loop`: how calls
    are made (chips.toml). `concurrency`: experts of a layer, or tracks, that run at once. How much
    of the context is in use does not matter: a static graph goes over the whole cache.
    """
    decode = workload.decode if traffic is None else _with_traffic(workload.decode, traffic)
    loaded = 0.0 if traffic is None else traffic.bytes_loaded_per_token
    one = breakdown(
        decode,
        chip,
        loop=loop,
        steps=workload.step_tokens,
        loaded_bytes=loaded,
        concurrency=concurrency,
    )
    chunk = breakdown(
        workload.prefill,
        chip,
        loop=loop,
        steps=workload.prefill_tokens,
        concurrency=concurrency,
    )
    return Prediction(
        chip=chip.name,
        loop=loop,
        decode=one,
        prefill=chunk,
        load_seconds=_seconds(workload.package_bytes, chip.range("load_gb_s")),
        first_load_seconds=_first_load(workload, chip),
        memory_bytes=memory(workload),
        tokens_per_joule=_over(one.tok_s, chip.range("decode_watts")),
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
    concurrency: int = 1,
) -> Breakdown:
    """The time of one step through `calls`, for each of its `steps` tokens. `host` False: without
    the token loop."""
    made = _Conditions(loop, concurrency, host)
    ends = {scenario: _parts(calls, chip, made, loaded_bytes, scenario) for scenario in SCENARIOS}
    whole = _combined(ends, steps)
    parts = {
        part: _ordered(*(ends[scenario][part] / steps for scenario in SCENARIOS)) for part in PARTS
    }
    return Breakdown(whole, Range(1e3 / whole.high, 1e3 / whole.expected, 1e3 / whole.low), parts)


def memory(workload: Workload) -> Range:
    """Bytes with everything loaded. Functions of one package share weights on disk; that each wires
    a copy on the engine is reported (coremltools 2351, anemll-forge), so the low end has one copy
    and the others one for each function; what the last token of a prompt alone goes through has
    one. Expert functions count once: theirs are seldom all loaded."""
    rest = workload.embed_bytes + workload.cache_bytes + workload.expert_bytes
    once = workload.package_bytes - workload.expert_bytes
    single = workload.tail_bytes
    each = workload.functions * (once - single) + single + rest
    return Range(once + rest, each, each)


@dataclass(frozen=True)
class _Conditions:
    """What calls are made under: the loop, how many experts at once, and whether by a token loop
    (which has a host)."""

    loop: Loop
    concurrency: int
    host: bool


def _parts(
    calls: tuple[Calls, ...], chip: Chip, made: _Conditions, loaded_bytes: float, end: Scenario
) -> dict[str, float]:
    """Milliseconds of each part."""
    parts = dict.fromkeys(PARTS, 0.0)
    bandwidth = chip.range("stream_gb_s").of_rate(end) * 1e6  # bytes in a ms
    host = chip.range("host_ms").of_cost(end) if made.host else 0.0
    number = sum(call.count.of_cost(end) for call in calls)
    for call in calls:
        apart = call.kind in EXPERT_CALLS and made.host
        own = chip.range("expert_host_ms").of_cost(end) if apart else 0.0
        count = call.count.of_cost(end)
        stream, excess = _call_ms(call, chip, end)
        kv = chip.range("kv_passes").of_cost(end) * call.cache_bytes / bandwidth
        task = stream + excess + kv
        gap = own + host / number if number else own
        at_once = count / _gain(call, chip, made, end)
        parts["head" if call.kind == "lm_head" else "weights"] += at_once * stream
        parts["head" if call.kind == "lm_head" else "compute"] += at_once * excess
        parts["kv"] += count * kv
        parts["calls"] += at_once * _beside_ms(task, chip, made.loop, end)
        if made.loop == "tight":  # what a naive call costs was measured with its gaps
            parts["clock"] += at_once * task * (clock_factor(gap, task, chip.name, end) - 1)
        parts["host"] += count * own
    parts["host"] += host
    parts["loads"] = loaded_bytes / (chip.range("load_gb_s").of_rate(end) * 1e6)
    return parts


def _beside_ms(task_ms: float, chip: Chip, loop: Loop, scenario: Scenario) -> float:
    """What a call costs beside its task."""
    if loop == "naive":
        return chip.range("naive_call_ms").of_cost(scenario)
    return chip.range("launch_ms").of_cost(scenario) + after_task_ms(task_ms, scenario)


def _gain(call: Calls, chip: Chip, made: _Conditions, scenario: Scenario) -> float:
    """Experts and tracks are different functions, which two engines serve at once; no other calls
    are."""
    if call.kind not in AT_ONCE or made.concurrency == 1:
        return 1.0
    return chip.range("concurrent_gain").of_rate(scenario)


def _call_ms(call: Calls, chip: Chip, scenario: Scenario) -> tuple[float, float]:
    """Milliseconds of streaming, and of computing beyond them, of one call."""
    stream = _stream_ms(call, chip, scenario)
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


def _stream_ms(call: Calls, chip: Chip, scenario: Scenario) -> float:
    """Milliseconds of streaming the weights of one call: their bytes, or what expanding them
    takes."""
    stream = call.stored_bytes / (chip.range("stream_gb_s").of_rate(scenario) * 1e6)
    if rate := chip.weights_per_second(call.rate):
        return max(stream, call.weights / (rate.of_rate(scenario) * 1e6))
    if call.rate == "fp16" or not call.weights:  # sparse ones among them: by their bytes
        return stream
    bits = 8 * call.stored_bytes / call.weights
    return stream * share_of_fp16(bits, chip.name).of_cost(scenario) * FP16_BITS / bits


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


def _over(rate: Range, watts: Range) -> Range:
    return Range(rate.low / watts.high, rate.expected / watts.expected, rate.high / watts.low)


def _first_load(workload: Workload, chip: Chip) -> Range:
    """By the bytes, and what compiling long chains adds."""
    read = _seconds(workload.package_bytes, chip.range("first_load_gb_s"))
    return add((read, compile_seconds(workload.chains, chip.name)))


def _seconds(size: int, rate: Range) -> Range:
    return Range(size / rate.high / 1e9, size / rate.expected / 1e9, size / rate.low / 1e9)
