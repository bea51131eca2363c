"""What bench returns: plain dataclasses, named as in the JSON document. Times are wall times of
this machine."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ane_moe.model.spec import Synchronisations
from ane_moe.verification.result import FunctionModelResult, json_numbers

FORMAT = 1


@dataclass(frozen=True)
class Latency:
    """Of `runs` calls, in ms; `p95_ms` is the nearest-rank 95th percentile."""

    median_ms: float
    p95_ms: float
    min_ms: float
    runs: int


@dataclass(frozen=True)
class Conditions:
    """What every figure of a report was measured under. None: this machine does not tell."""

    label: str  # of the runtime: what its times are times of
    chip: str
    os: str
    units: str | None  # Core ML's compute units; None on the reference runtime
    cores: int
    load_average: float | None  # over the last minute, when the run began
    power_source: str | None
    low_power_mode: bool | None
    thermal: str | None  # what the system said when the run ended
    versions: dict[str, str]
    weights: str
    routing: str
    context: int
    prefill_tokens: int  # T of the prefill functions, 0 when there are none
    warmup: int  # calls before those that count
    # Packages Core ML had compiled before, of all; None on other runtimes.
    compiled_before: tuple[int, int] | None
    started: str  # UTC
    # Of the layers' multiplications by weights for a long prompt, those that are left out.
    tail_share: float = 0.0
    adapter: str | None = None  # switched on

    @property
    def all_compiled(self) -> bool:
        """Whether loading needed no compilation."""
        return (
            self.compiled_before is not None and self.compiled_before[0] == self.compiled_before[1]
        )


@dataclass(frozen=True)
class OutputCheck:
    """The whole model through one kind of function against a golden, in this very run: "original"
    or, for compressed weights, also "as stored" (the same model with the weights that the packages
    hold).

    `wrong_tokens` are greedy tokens other than the golden's where the golden's preference was
    larger than any error that the cosine gate allows could turn.
    """

    golden: str
    model: FunctionModelResult
    wrong_tokens: int

    @property
    def passed(self) -> bool:
        return self.model.passed and not self.wrong_tokens


@dataclass(frozen=True)
class FunctionTiming:
    """One function, alone, on seeded inputs: the largest shard of its kind. `load_seconds` is of
    the function once compiled; `shards` of the kind exist, and `tokens` is T."""

    kind: str
    path: str
    function: str
    tokens: int
    shards: int
    weight_bytes: int
    load_seconds: float
    first_call_ms: float
    latency: Latency


@dataclass(frozen=True)
class CacheTiming:
    """The cache of expert functions while the row it belongs to was measured."""

    hits: int
    late: int
    misses: int
    hit_rate: float
    bytes_loaded: int
    bytes_resident: int


@dataclass(frozen=True)
class LoopTiming:
    """The whole token loop. Decode: `tokens` one by one after `fill` tokens of context, `latency`
    of one token. Prefill: `tokens` at once into an empty context, `latency` of all of them, up to
    the last one's logits. Windows of an encoder: `tokens` at once, `latency` of all their scores.

    `kinds_ms` is time inside calls per token by shard kind (added up also where calls overlap),
    `load_ms` waiting for expert functions, `host_ms` everything else; `gap_ms` is the host's part
    and the waiting before each call. `synchronisations_per_token`: how often tracks met.
    """

    fill: int
    tokens: int
    tok_s: float
    latency: Latency
    calls_per_token: float
    kinds_ms: dict[str, float]
    load_ms: float
    host_ms: float
    gap_ms: float
    cache: CacheTiming | None = None
    synchronisations_per_token: float = 0.0


@dataclass(frozen=True)
class LoadTiming:
    """All shards: opening and loading them, and the first token after it."""

    seconds: float
    first_token_seconds: float
    functions: int


@dataclass(frozen=True)
class Memory:
    """`process_bytes` and `peak_bytes` are this process's resident memory. What Core ML and the
    Neural Engine hold outside the process is not in them."""

    process_bytes: int
    peak_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    expert_cache_peak_bytes: int | None = None


@dataclass(frozen=True)
class PowerReading:
    """Mean power in mW over `seconds`, as powermetrics estimates it for the whole machine."""

    cpu_mw: float
    gpu_mw: float
    ane_mw: float
    seconds: float
    thermal_pressure: str | None

    @property
    def total_mw(self) -> float:
        return self.cpu_mw + self.gpu_mw + self.ane_mw


@dataclass(frozen=True)
class Energy:
    """Power of the machine idle and while decoding `tokens`; `limits` says what the figures are
    good for."""

    idle: PowerReading
    decoding: PowerReading
    tokens: int
    mj_per_token: float
    mj_per_token_above_idle: float
    limits: str


@dataclass(frozen=True)
class Side:
    """One of two programs that ran the same prompt: medians over `runs`."""

    name: str
    weights: str
    prefill_tok_s: float
    decode_tok_s: float
    new_tokens: int
    peak_bytes: int
    runs: int


@dataclass(frozen=True)
class Versus:
    """The same prompt and number of new tokens through another program, right after ours."""

    prompt_tokens: int
    ours: Side
    theirs: Side
    remark: str


@dataclass(frozen=True)
class BenchReport:
    """With `passed` false the output was wrong, and there is no figure of speed at all."""

    passed: bool
    folder: str
    runtime: str
    conditions: Conditions
    checks: tuple[OutputCheck, ...]
    load: LoadTiming | None = None
    functions: tuple[FunctionTiming, ...] = ()
    decode: tuple[LoopTiming, ...] = ()
    prefill: tuple[LoopTiming, ...] = ()
    windows: tuple[LoopTiming, ...] = ()
    memory: Memory | None = None
    energy: Energy | None = None
    energy_skipped: str | None = None
    versus: Versus | None = None
    predicted: dict[str, Any] | None = None  # benchmark/beside.py
    predicted_skipped: str | None = None
    synchronisations: Synchronisations | None = None  # of tracks, as planned

    @property
    def is_device(self) -> bool:
        """Whether the times are Core ML's on this machine, and not the reference runtime's."""
        return self.runtime == "coreml"

    def as_json(self) -> dict[str, Any]:
        """The document of `--json` and `--save`. `device_figures` false: no time in it is a
        device's."""
        document = json_numbers(asdict(self))
        for entry, check in zip(document["checks"], self.checks, strict=True):
            entry["passed"] = check.passed
        return {"format": FORMAT, "device_figures": self.is_device} | document


def latency(seconds: Sequence[float]) -> Latency:
    """Of at least one call."""
    ordered = sorted(1000 * one for one in seconds)
    rank = -(-95 * len(ordered) // 100)
    return Latency(statistics.median(ordered), ordered[rank - 1], ordered[0], len(ordered))
