"""Test vectors of a conversion: what every function is given and gives in a short run, for whoever
writes another host (docs/hosts.md)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ane_moe.errors import UserError
from ane_moe.files import replaced, sha256, write_text
from ane_moe.loop.expert_cache import ExpertCache, FunctionKey
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShard, LoadedShards, load_shards
from ane_moe.manifest import FILE_NAME
from ane_moe.model.port import Port
from ane_moe.runtime.interface import LoadedFunction

FORMAT = 1
INDEX, TENSORS = "vectors.json", "vectors.safetensors"
STRIDE = 7  # ids of a run are 3, 10, 17, ... modulo the vocabulary: any will do


@dataclass(frozen=True)
class Value:
    """What went through one port: its slot, and its tensor's name in the file."""

    slot: str
    tensor: str


@dataclass(frozen=True)
class RecordedCall:
    """One call of one function, in the run's order; `step` is the step it belongs to."""

    step: int
    package: str
    function: str
    inputs: dict[str, Value]
    outputs: dict[str, Value]


@dataclass(frozen=True)
class RecordedStep:
    """`tokens` of the ids, from `first` on, taken in by `function`; `logits` of the last of
    them."""

    function: str
    first: int
    tokens: int
    logits: str


@dataclass(frozen=True)
class Vectors:
    """The index that is written beside the tensors. `manifest` and `tensors` are sha256 of
    runtime_meta.json and of the file of tensors."""

    manifest: str
    tensors: str
    runtime: str
    ids: tuple[int, ...]
    steps: tuple[RecordedStep, ...]
    calls: tuple[RecordedCall, ...]
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


@dataclass
class Recorder:
    """Copies of what goes through the ports of functions that are called through it."""

    step: int = 0
    calls: list[RecordedCall] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def note(
        self, ports: "_Ports", inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
    ) -> None:
        """Keep a call."""
        place = f"call_{len(self.calls):04d}"
        taken = dict(self._kept(ports.inputs, inputs, f"{place}.in"))
        given = dict(self._kept(ports.outputs, outputs, f"{place}.out"))
        self.calls.append(RecordedCall(self.step, ports.package, ports.function, taken, given))

    def _kept(
        self, ports: Sequence[Port], arrays: dict[str, np.ndarray], place: str
    ) -> Iterator[tuple[str, Value]]:
        for port in ports:
            tensor = f"{place}.{port.name}"
            self.tensors[tensor] = np.array(arrays[port.name])  # slots change, copies do not
            yield port.name, Value(port.slot, tensor)

    def keep_logits(self, logits: np.ndarray) -> str:
        """Keep what a step ended with, fp32 `[V]`; the tensor's name."""
        name = f"step_{self.step}.logits"
        self.tensors[name] = np.array(logits)
        return name


@dataclass(frozen=True)
class _Ports:
    """A function by its place, and its ports."""

    package: str
    function: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class _Recorded:
    """A loaded function that notes its calls."""

    function: LoadedFunction
    ports: _Ports
    recorder: Recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def predict(self, inputs: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        before = {name: np.array(array) for name, array in inputs.items()}
        outputs = self.function.predict(inputs, state)
        self.recorder.note(self.ports, before, outputs)
        return outputs


def write_vectors(
    out: Path, folder: Path, *, tokens: int = 20, decoded: int = 4, runtime: str = "auto"
) -> Vectors:
    """Run the conversion in `out` over `tokens` ids, the last `decoded` of them one by one, each
    the likeliest after those before it, and write `vectors.json` and `vectors.safetensors` into
    `folder`.

    Raises UserError for a folder that is no whole conversion of a language model, for a run that
    does not fit its context, and for a folder that cannot be written.
    """
    if not 0 <= decoded < tokens:
        raise UserError("there is no prompt", f"{decoded} of {tokens} tokens are decoded")
    recorder = Recorder()
    shards = _watched(load_shards(out, runtime), recorder)
    session, vocab = Session(shards), shards.manifest.vocab
    ids = [(3 + STRIDE * place) % vocab for place in range(tokens - decoded)]
    name = "prefill" if shards.manifest.prefill else "decode"
    steps = [RecordedStep(name, 0, len(ids), recorder.keep_logits(session.prefill(ids)))]
    for _ in range(decoded):
        recorder.step += 1
        ids.append(int(recorder.tensors[steps[-1].logits].argmax()))
        logits = recorder.keep_logits(session.decode(ids[-1]))
        steps.append(RecordedStep("decode", len(ids) - 1, 1, logits))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / TENSORS) as temporary:
            save_file(recorder.tensors, temporary)
        found = Vectors(
            sha256(out / FILE_NAME),
            sha256(folder / TENSORS),
            shards.runtime,
            tuple(ids),
            tuple(steps),
            tuple(recorder.calls),
        )
        write_text(folder / INDEX, json.dumps(found.as_json(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written", str(error.strerror)) from None
    return found


def _watched(shards: LoadedShards, recorder: Recorder) -> LoadedShards:
    """The same shards, every function of them through `recorder`."""

    def through(step: LoadedShard) -> LoadedShard:
        functions: dict[str, LoadedFunction] = {}
        for entry in step.shard.functions:
            ports = _Ports(step.shard.path, entry.name, entry.ports.inputs, entry.ports.outputs)
            functions[entry.name] = _Recorded(step.functions[entry.name], ports, recorder)
        return LoadedShard(step.shard, functions)

    steps = tuple(through(step) if isinstance(step, LoadedShard) else step for step in shards.steps)
    cache = shards.cache and _watched_cache(shards, shards.cache, recorder)
    return replace(shards, steps=steps, cache=cache)


def _watched_cache(shards: LoadedShards, cache: ExpertCache, recorder: Recorder) -> ExpertCache:
    entries = {
        FunctionKey(shard.path, entry.name): entry
        for shard in shards.manifest.shards
        for entry in shard.functions
    }

    def load(key: FunctionKey) -> LoadedFunction:
        ports = entries[key].ports
        with cache.hold(key) as function:  # without a limit it stays
            named = _Ports(key.path, key.name, ports.inputs, ports.outputs)
            return _Recorded(function, named, recorder)

    return ExpertCache(load, cache.resident_bytes)
