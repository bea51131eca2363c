"""A conversion by two runtimes that know nothing of each other: each distinct part is given the
same inputs in both, and what they give and keep is compared.

Where the conversion has a golden, its hidden states are the inputs, and Hugging Face's model is the
third opinion; else, and for experts that the host dispatches, they are drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import rope_tables
from ane_moe.loop.shards import LoadedShard
from ane_moe.manifest import Manifest, Shard, ShardFunction, read_manifest
from ane_moe.mlprogram.program import Function
from ane_moe.mlprogram.reader import open_program
from ane_moe.model.port import STREAM, WEIGHT
from ane_moe.original.golden import Golden
from ane_moe.origins import shown
from ane_moe.package_form import PACKAGE
from ane_moe.progress import Progress, silent
from ane_moe.runtime import open_package, resolve_runtime
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.interface import LoadedFunction, NotExecuted
from ane_moe.verification.goldens import read_goldens
from ane_moe.verification.pairs import (
    TOLERANCE,
    AgainstReport,
    LeftOut,
    PairResult,
    Sums,
    paired,
)
from ane_moe.verification.parity import Parity
from ane_moe.verification.result import ShardResult
from ane_moe.verification.stage import alone, stages
from ane_moe.verification.verify import function_gate

OURS = "reference"
DECODE_TOKENS = 8
CALLS = 2  # on drawn inputs: the second one meets what the first has kept
MEMORY, REST = "memory", "rest"  # a sum, and what its rounding left over (parts/lightning.py)
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Witnesses:
    """The states of one sequence in both runtimes."""

    ours: Any
    theirs: Any


@dataclass
class Witness:
    """A function in both runtimes: gives what the other one gives, and notes how far ours is from
    it. Each has a state of its own; both are given the same inputs."""

    ours: LoadedFunction
    theirs: LoadedFunction
    entry: ShardFunction
    noted: dict[str, Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs, self.outputs, self.states = (
            self.ours.inputs,
            self.ours.outputs,
            self.ours.states,
        )
        given = {port.slot: port.name for port in self.entry.ports.inputs if port.root == STREAM}
        self._bases = {port.name: given.get(port.slot) for port in self.entry.ports.outputs}

    def make_state(self) -> Witnesses:
        return Witnesses(self.ours.make_state(), self.theirs.make_state())

    def predict(
        self, inputs: dict[str, np.ndarray], state: Witnesses | None = None
    ) -> dict[str, np.ndarray]:
        kept = state or Witnesses(None, None)
        ours = self.ours.predict(inputs, kept.ours)
        theirs = self.theirs.predict(inputs, kept.theirs)
        mine, other = (
            _whole(outputs | {one.name: states.read(one.name) for one in self.states})
            for outputs, states in ((ours, kept.ours), (theirs, kept.theirs))
        )
        for name, value in mine.items():
            base = self._bases.get(name)
            sums = self.noted.setdefault(name, Sums())
            sums.add(value, other[name], None if base is None else inputs[base])
        return theirs


def _whole(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values, but what the rounding of another one left over together with that: alone it is as
    large as a unit in the other's last place, and anything."""
    return {
        name: values[MEMORY + name.removeprefix(REST)].astype(np.float32) + value
        if name.startswith(REST)
        else value
        for name, value in values.items()
    }


def check_against(
    out: Path,
    runtime: str,
    *,
    min_cosine: float | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> AgainstReport:
    """Every distinct part of the conversion in `out`, by the reference runtime and by another one.

    `min_cosine` is what the other one has to reach against the golden (None: the usual one of
    `verify`). Raises UserError where there is no conversion, or the other runtime is not installed.
    """
    told, manifest, runtime = progress or silent, read_manifest(out), resolve_runtime(runtime)
    require_programs(manifest)
    golden = read_goldens(out, manifest, False)[0].original if manifest.golden else None
    least = function_gate(manifest, min_cosine)
    judge = _Judge(out, manifest, runtime, golden, least, tolerance)
    groups = judge.groups()
    pairs: list[PairResult] = []
    rows: list[ShardResult] = []
    left_out: list[LeftOut] = []
    for number, (shards, names) in enumerate(groups):
        told(f"{runtime}: {shards[0].kind}", number, len(groups))
        try:
            found, against = judge.judged(shards, names)
        except NotExecuted as error:
            left_out.append(LeftOut(shards[0].path, str(error)))
            continue
        pairs += found
        rows += against
    told(runtime, len(groups), len(groups))
    passed = not left_out and all(one.passed for one in pairs) and all(one.passed for one in rows)
    return AgainstReport(
        passed,
        shown(out),
        runtime,
        tolerance,
        "golden" if golden else "drawn",
        len(groups),
        len(manifest.shards),
        tuple(pairs),
        tuple(rows),
        tuple(left_out),
    )


def require_programs(manifest: Manifest) -> None:
    """Raise UserError for what the reference runtime has no program of."""
    if manifest.package_form != PACKAGE:
        raise UserError(
            "Core AI's assets have no program for a second runtime",
            f"{manifest.package_form} packages",
            "convert with --format mlpackage for --against, or verify without it",
        )


@dataclass(frozen=True)
class _Judge:
    """Opens the shards of a conversion in both runtimes."""

    out: Path
    manifest: Manifest
    runtime: str
    golden: Golden | None
    min_cosine: float
    tolerance: float

    def groups(self) -> list[tuple[tuple[Shard, ...], tuple[str, ...]]]:
        """Shards that are looked at together, and the functions of them: one of each kind of
        program, whatever its weights are."""
        shards = {shard.path: shard for shard in self.manifest.packages}
        together = [
            tuple(step for step in stage if isinstance(step, Shard))
            for stage in stages(self.manifest)
        ]
        together += [(shard,) for shard in shards.values() if shard.dispatched]
        seen: set[Key] = set()
        found = []
        for group in filter(None, together):
            forms = self._forms(group)
            if group[0].dispatched:  # each by itself: one of those that are alike
                first = {form: name for name, form in reversed(forms.items())}
                forms = {name: form for form, name in reversed(first.items())}
            fresh = tuple(name for name, form in forms.items() if form not in seen)
            if fresh:
                found.append((group, fresh))
            seen |= set(forms.values())
        return found

    def _forms(self, group: Sequence[Shard]) -> dict[str, Key]:
        """What tells one function of a group from others, by its name."""
        forms: dict[str, Key] = {}
        for shard in group:
            program = open_program(self.out / shard.path).read()
            for name, function in program.functions.items():
                forms[name] = (*forms.get(name, ()), _form(function))
        return forms

    def judged(
        self, group: tuple[Shard, ...], names: tuple[str, ...]
    ) -> tuple[list[PairResult], list[ShardResult]]:
        """Rows of a group, of the functions of these names."""
        witnesses = [self._witnesses(shard, names) for shard in group]
        rows: list[ShardResult] = []
        if self.golden is None or group[0].dispatched:
            for functions in witnesses:
                _call_on_drawn(functions)
        else:
            loaded = [
                LoadedShard(shard, dict(functions))
                for shard, functions in zip(group, witnesses, strict=True)
            ]
            parity = self._parity(self.golden)
            found = (row for own in alone(loaded) for row in parity.rows(own))
            rows = [row for row in found if isinstance(row, ShardResult)]
        pairs = [
            paired(shard, name, value, sums, self.tolerance)
            for shard, functions in zip(group, witnesses, strict=True)
            for name, witness in functions.items()
            for value, sums in witness.noted.items()
        ]
        return pairs, rows

    def _witnesses(self, shard: Shard, names: tuple[str, ...]) -> dict[str, Witness]:
        """The functions of a shard in both runtimes; all of them where they work together."""
        ours, theirs = (open_package(self.out / shard.path, name) for name in (OURS, self.runtime))
        wanted = [entry for entry in shard.functions if not shard.dispatched or entry.name in names]
        return {
            entry.name: Witness(ours.function(entry.name), theirs.function(entry.name), entry)
            for entry in wanted
        }

    def _parity(self, golden: Golden) -> Parity:
        return Parity(
            self.out,
            self.manifest,
            golden,
            self.min_cosine,
            DECODE_TOKENS,
            rope_tables(self.manifest),
            self._lender,
        )

    def _lender(self, shard: Shard) -> LoadedShard:
        """What keeps the caches that others read: ours, so that both are given the same."""
        package = open_package(self.out / shard.path, OURS)
        functions = {entry.name: package.function(entry.name) for entry in shard.functions}
        return LoadedShard(shard, functions)


def _form(function: Function) -> Key:
    """What a program computes, its weights and names aside."""
    operations = tuple(
        (op.type, tuple(output.type for output in op.outputs)) for op in function.block.operations
    )
    return (tuple(one.type for one in function.inputs), operations)


def _call_on_drawn(functions: dict[str, Witness]) -> None:
    """Each function on normal inputs; those of one shard share their states, as in generation."""
    state = None
    for function in functions.values():
        if function.states and state is None:
            state = function.make_state()
        for call in range(CALLS):
            function.predict(_drawn(function, call), state)


def _drawn(function: Witness, seed: int) -> dict[str, np.ndarray]:
    """Normal numbers; weights that are given are small enough for sums within fp16."""
    drawn = random_inputs(function.inputs, seed)
    for port in function.entry.ports.inputs:
        if port.root == WEIGHT:
            drawn[port.name] = (drawn[port.name] / math.sqrt(port.shape[1])).astype(np.float16)
    return drawn
