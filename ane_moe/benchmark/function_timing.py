"""Single functions: load, first call and warm latency of the largest shard of every kind."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ane_moe.benchmark.result import FunctionTiming, latency
from ane_moe.loop.buffers import Ropes, Slots, rope_tables
from ane_moe.loop.expert_cache import FunctionKey
from ane_moe.loop.expert_store import StoreSource
from ane_moe.manifest import EXPERT_GRAPH, Manifest, Shard, ShardFunction
from ane_moe.progress import Progress
from ane_moe.runtime import open_package
from ane_moe.runtime.interface import LoadedFunction


def time_functions(
    folder: Path,
    manifest: Manifest,
    runtime: str,
    warmup: int,
    runs: int,
    progress: Progress,
    **options: Any,
) -> Iterator[FunctionTiming]:
    """One row for each function of the largest shard of each kind; of its experts, the first."""
    ropes = rope_tables(manifest)
    called = [shard for shard in manifest.shards if shard.kind != EXPERT_GRAPH]  # of the host
    kinds = list(dict.fromkeys(shard.kind for shard in called))
    for number, kind in enumerate(kinds):
        shards = [shard for shard in manifest.shards if shard.kind == kind]
        largest = max(shards, key=lambda shard: shard.weight_bytes)
        for entry in _shown(largest):
            progress(f"timing {kind} {entry.name}", number, len(kinds))
            load = partial(_load, folder, manifest, largest, entry, runtime, options)
            yield _time(load, largest, entry, len(shards), ropes, warmup, runs)


def _shown(shard: Shard) -> list[ShardFunction]:
    """Functions of a shard; those of its first experts stand for all of them."""
    if not shard.dispatched:
        return list(shard.functions)
    first = next(experts for experts in shard.copies if experts)
    return [entry for entry in shard.functions if entry.experts == first or not entry.experts]


def _load(
    folder: Path,
    manifest: Manifest,
    shard: Shard,
    entry: ShardFunction,
    runtime: str,
    options: dict[str, Any],
) -> LoadedFunction:
    """A function of a package, or an expert of a store, read."""
    if shard.store is None:
        return open_package(folder / shard.path, runtime, **options).function(entry.entry)
    stores = StoreSource(folder, manifest, runtime, **options)
    return stores.load(FunctionKey(shard.path, entry.name))


def _time(
    load: Callable[[], LoadedFunction],
    shard: Shard,
    entry: ShardFunction,
    shards: int,
    ropes: Ropes,
    warmup: int,
    runs: int,
) -> FunctionTiming:
    started = perf_counter()
    function = load()
    loaded = perf_counter()
    inputs, state = example_inputs(entry, ropes), function.make_state() if function.states else None
    ready = perf_counter()
    function.predict(inputs, state)
    first = perf_counter() - ready
    for _ in range(warmup):
        function.predict(inputs, state)
    seconds = []
    for _ in range(runs):
        began = perf_counter()
        function.predict(inputs, state)
        seconds.append(perf_counter() - began)
    return FunctionTiming(
        shard.kind,
        shard.path,
        entry.name,
        entry.tokens,
        shards,
        shard.weight_bytes,
        loaded - started,
        1000 * first,
        latency(seconds),
    )


def example_inputs(entry: ShardFunction, ropes: Ropes) -> dict[str, np.ndarray]:
    """Seeded fp16 inputs of a function as at the start of a text: what other functions give are
    normal numbers, the host's own slots stand at position 0, nothing is kept yet. They stay finite
    however often they are used."""
    rng = np.random.default_rng(0)
    slots = Slots(ropes)
    inputs = {port.name: slots.array(port) for port in entry.ports.inputs}
    slots.place(0, entry.tokens)
    for port in entry.ports.inputs:
        if port.by_channel:
            inputs[port.name][:] = rng.standard_normal(port.shape)
    return inputs
