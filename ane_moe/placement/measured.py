"""Measured placement (macOS): Core ML's compute plan of every function, and how far CPU and engine
differ."""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import write_text
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.analytics import segmented, stretches_of
from ane_moe.placement.facts import FunctionFacts, function_facts, is_real
from ane_moe.placement.machine import this_machine
from ane_moe.placement.result import (
    MEASURED,
    Finding,
    FunctionPlacement,
    OpPlacement,
    PlacementReport,
    worst_first,
)
from ane_moe.runtime.coreml.modelc_cache import PLANS, ModelCache
from ane_moe.runtime.coreml.runtime import PASSED_AS, default_cache, load_function, require_core_ml
from ane_moe.runtime.coreml.trial import TIME_LIMIT_SECONDS, TrialProcess
from ane_moe.runtime.interface import LoadedFunction

COMMAND = (sys.executable, "-m", "ane_moe.placement.measured_child")
UNITS = "cpu_and_ne"
MIN_COST_SHARE = 0.99
GATED = "conv"  # every one of these has to be on the engine
SEED = 0
LARGE_KERNEL, MANY_CONVOLUTIONS = 16, 386
Progress = Callable[[str, int, int], None]

# What Core ML's messages and ends mean: finding, fragments of the message, usual causes.
FAILURES = (
    (
        "engine-compiler-failed",
        ("error code: -14", "ANECCompile", "ANECCOMPILE"),
        "usual causes: a state whose last axis is no multiple of 32, a cache written at a "
        "computed place, more than 2 GiB "
        "of weights, more than 3 GB loaded in one process, or a model compiled before the last "
        "system update",
    ),
    (
        "weights-too-large",
        ("exceeds the maximum", "Weight file size"),
        "cut the package into shards below 2 GiB",
    ),
    ("out-of-memory", ("SIGKILL",), "macOS ends what takes too much memory: use smaller shards"),
    (
        "crash",
        ("SIG", "exit code"),
        "a crash inside Core ML: known for palettized weights under macOS 26, per-block "
        "weights, and models the engine cannot hold; look at what the prediction says of this "
        "function",
    ),
    (
        "no-answer",
        ("no answer within",),
        "the engine's compiler may still be at work: use smaller shards, or give it more time",
    ),
)
OTHER_FAILURE = (
    "plan-failed",
    "see the message; `ane-moe inspect --placement` tells which rules the package breaks",
)


def measure(
    packages: Iterable[tuple[Path, str]],
    *,
    allow: tuple[str, ...] = (),
    cache: ModelCache | None = None,
    min_cost_share: float = MIN_COST_SHARE,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
    numerics: bool = True,
    progress: Progress | None = None,
) -> PlacementReport:
    """Measure every function of every package, given as (path, name to report it under).

    The gate: every convolution, and `min_cost_share` of the estimated cost, on the engine;
    operation types in `allow` count for neither. A plan that cannot be had is a finding. Raises
    UserError when Core ML is not there.
    """
    require_core_ml()
    machine = this_machine()
    auditor = _Auditor(cache or default_cache(), time_limit_seconds, numerics)
    work = [
        (path, name, function, slow_to_compile(function_facts(program, function)))
        for path, name in packages
        for program in (read_program(path),)
        for function in program.functions
    ]
    rows = []
    try:
        for number, (path, name, function, warning) in enumerate(work):
            if progress:
                progress(f"compute plan of {name} {function}{warning}", number, len(work))
            rows.append(
                _placement(name, function, auditor.record(path, function), allow, min_cost_share)
            )
    finally:
        auditor.stop()
    return PlacementReport(MEASURED, machine.chip, machine.os, tuple(rows))


def slow_to_compile(function: FunctionFacts) -> str:
    """A warning, where compiling such a function is known to explode: asking for a plan compiles.

    A convolution of 16 x 16 took 212 to 229 s and 11.7 GB on an M4; 387 convolutions, one after
    another, crashed the compiler of an M6 or never ended (751K's study, sw2_mem.tsv, defects).
    """
    for op in function.ops:
        sides = (op.facts.get("kernel_h") or 1, op.facts.get("kernel_w") or 1)
        strides = op.facts.get("arg_strides") or (1,)
        if min(sides) >= LARGE_KERNEL and strides[-1] < sides[-1]:
            return f" (a kernel of {sides[0]} x {sides[1]}: may take minutes and 12 GB)"
    if function.facts["convolutions"] > MANY_CONVOLUTIONS:
        return f" ({function.facts['convolutions']} convolutions: may crash, or never end)"
    return ""


class _Auditor:
    """Keeps one child for all plans until one of them ends it, and what was found by the package's
    content."""

    def __init__(self, cache: ModelCache, time_limit_seconds: float, numerics: bool):
        self.cache, self.limit, self.numerics = cache, time_limit_seconds, numerics
        self.child: TrialProcess | None = None
        self.folder = cache.folder / PLANS
        self.folder.mkdir(exist_ok=True)

    def record(self, package: Path, function: str) -> dict[str, Any]:
        """`ops`, and `numerics` where asked for; or `error`, or `numerics_error`. Only what has
        neither is kept."""
        facts = f"{self.cache.key(package)}\n{function}\n{UNITS}\n{self.numerics}"
        kept = self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:40]}.json"
        if kept.is_file():
            return dict(json.loads(kept.read_text()))
        record = self._ask(package, function)
        if "error" in record or not any(op["device"] for op in record["ops"]):
            return record
        if self.numerics:
            try:
                record["numerics"] = compare_units(package, function, self.cache, self.limit)
            except UserError as error:
                record["numerics_error"] = str(error)
        if "numerics_error" not in record:
            write_text(kept, json.dumps(record))
        return record

    def stop(self) -> None:
        if self.child is not None:
            self.child.end()
        self.child = None

    def _ask(self, package: Path, function: str) -> dict[str, Any]:
        request = {
            "package": str(package.resolve()),
            "function": function,
            "units": UNITS,
            "folder": str(self.cache.folder / "work"),
        }
        self.child = self.child or TrialProcess(COMMAND)
        try:
            answer = self.child.ask(request, self.limit)
        except TimeoutError:
            self.child = None
            return {"error": f"no answer within {self.limit:g} s"}
        if answer is None:
            child, self.child = self.child, None
            child.process.wait()
            return {"error": _ending(child.end(), child.last_words())}
        return answer


def compare_units(
    package: Path, function: str, cache: ModelCache, time_limit_seconds: float = TIME_LIMIT_SECONDS
) -> dict[str, dict[str, float]]:
    """The same inputs on CPU alone and on CPU and engine, by output: relative L2 and maximum error.

    Inputs are standard normal (seed 0), integers zero, states zero at the start. Raises UserError
    when Core ML fails, in a child process first.
    """
    both = [
        load_function(
            package, function, units=units, cache=cache, time_limit_seconds=time_limit_seconds
        )
        for units in ("cpu_only", UNITS)
    ]
    inputs = _inputs(both[0])
    alone, engine = (
        loaded.predict(inputs, loaded.make_state() if loaded.states else None) for loaded in both
    )
    return {
        name: _difference(alone[name].astype(np.float64), engine[name].astype(np.float64))
        for name in alone
    }


def _inputs(function: LoadedFunction) -> dict[str, np.ndarray]:
    random = np.random.default_rng(SEED)
    arrays = {}
    for feature in function.inputs:
        shape, dtype = [size or 1 for size in feature.type.shape], PASSED_AS[feature.type.dtype]
        is_float = np.dtype(dtype).kind == "f"
        arrays[feature.name] = (
            random.standard_normal(shape) if is_float else np.zeros(shape)
        ).astype(dtype)
    return arrays


def _difference(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    error = np.abs(got - expected)
    norm = float(np.linalg.norm(expected))
    return {
        "relative_l2": float(np.linalg.norm(error)) / norm
        if norm
        else float(np.linalg.norm(error)),
        "max_abs_error": float(error.max(initial=0.0)),
    }


def _placement(
    path: str, function: str, record: dict[str, Any], allow: tuple[str, ...], min_cost_share: float
) -> FunctionPlacement:
    if "error" in record:
        return FunctionPlacement(path, function, (), (_failure(record["error"], "plan"),), allow)
    real = [op for op in record["ops"] if is_real(op["type"])]
    if not any(op["device"] for op in real):
        return FunctionPlacement(path, function, (), (_EMPTY,), allow)
    ops = tuple(
        OpPlacement(op["name"] or op["type"], op["type"], op["device"] or "uncertain", op["cost"])
        for op in real
    )
    findings = [_off_engine(op) for op in real if op["device"] != "ane"]
    if "numerics_error" in record:
        findings.append(_failure(record["numerics_error"], "first prediction"))
    segments = [segmented(segment) for segment in record.get("segments", ())]
    row = FunctionPlacement(
        path,
        function,
        ops,
        (),
        allow,
        stretches=stretches_of(segments),
        segments=tuple(segments),
        numerics=record.get("numerics", {}),
    )
    counted = replace(row, ops=tuple(op for op in ops if op.op_type not in allow))
    share = counted.cost_share_ane
    if share is not None and share < min_cost_share:
        findings.append(
            _finding(
                "cost-share",
                "cpu",
                f"{share:.2%} of the estimated cost is on the engine, "
                f"{min_cost_share:.0%} is asked for",
                "see the operations off the engine",
                True,
            )
        )
    return replace(row, findings=worst_first(findings))


def _off_engine(op: dict[str, Any]) -> Finding:
    if op["device"] is None:
        words, verdict = "the plan names no device for it", "uncertain"
    else:
        could = (
            "could run on the engine, and was not worth it"
            if "ane" in op["supported"]
            else ("cannot run on the engine")
        )
        words, verdict = f"planned for the {op['device'].upper()}: it {could}", op["device"]
    finding = _finding(
        "off-engine",
        verdict,
        words,
        "`ane-moe inspect --placement` tells which rule it breaks, if any",
        op["type"] == GATED,
    )
    return replace(finding, op=op["name"] or op["type"], op_type=op["type"])


def _failure(message: str, step: str) -> Finding:
    found = next(
        (
            (name, causes)
            for name, fragments, causes in FAILURES
            if any(fragment in message for fragment in fragments)
        ),
        OTHER_FAILURE,
    )
    return _finding(found[0], "cpu", f"{step}: {message}", found[1], True)


def _finding(rule: str, verdict: str, reason: str, remedy: str, binding: bool) -> Finding:
    return Finding(
        None, None, verdict, rule, reason, remedy, "MLComputePlan", "measured", binding=binding
    )


_EMPTY = _finding(
    "empty-plan",
    "cpu",
    "the plan names no device for any operation",
    "usual causes: the package is not an ML Program, the function is not in it, or loading it "
    "failed "
    "without an error; try it alone on a Mac with the latest system",
    True,
)


def _ending(code: int, words: str) -> str:
    """How a child ended, with its last words."""
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process ended with {how}{': ' + words if words else ''}"
