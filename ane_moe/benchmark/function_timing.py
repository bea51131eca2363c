"""Single functions: load, first call and warm latency of the largest shard of every kind."""

import re
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ane_moe.benchmark.result import FunctionTiming, latency
from ane_moe.manifest import Manifest, Shard
from ane_moe.progress import Progress
from ane_moe.runtime import open_package
from ane_moe.runtime.interface import LoadedFunction

FIRST_EXPERT = re.compile(r"expert_\d+_")


def time_functions(folder: Path, manifest: Manifest, runtime: str, warmup: int, runs: int, progress: Progress,
                   **options: Any) -> Iterator[FunctionTiming]:
    """One row for each function of the largest shard of each kind; of its experts, the first."""
    kinds = list(dict.fromkeys(shard.kind for shard in manifest.shards))
    for number, kind in enumerate(kinds):
        shards = [shard for shard in manifest.shards if shard.kind == kind]
        largest = max(shards, key=lambda shard: shard.weight_bytes)
        for name, tokens in _shown(largest):
            progress(f"timing {kind} {name}", number, len(kinds))
            yield _time(folder, largest, name, tokens, len(shards), runtime, warmup, runs, options)


def _shown(shard: Shard) -> Iterator[tuple[str, int]]:
    """Functions of a shard; those of one expert stand for all."""
    experts = [found[0] for function in shard.functions if (found := FIRST_EXPERT.match(function.name))]
    for function in shard.functions:
        if not FIRST_EXPERT.match(function.name) or function.name.startswith(experts[0]):
            yield function.name, function.tokens


def _time(folder: Path, shard: Shard, name: str, tokens: int, shards: int, runtime: str, warmup: int, runs: int,
          options: dict[str, Any]) -> FunctionTiming:
    started = perf_counter()
    function = open_package(folder / shard.path, runtime, **options).function(name)
    loaded = perf_counter()
    inputs, state = example_inputs(function), function.make_state() if function.states else None
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
    return FunctionTiming(shard.kind, shard.path, name, tokens, shards, shard.weight_bytes, loaded - started,
                          1000 * first, latency(seconds))


def example_inputs(function: LoadedFunction) -> dict[str, np.ndarray]:
    """Seeded fp16 inputs of the declared shapes: a cache written at slot 0 and kept elsewhere, nothing hidden, zeros
    in caches passed as inputs, normal numbers in the rest. They stay finite however often they are used."""
    rng = np.random.default_rng(0)
    return {feature.name: _example(feature.name, tuple(size or 1 for size in feature.type.shape), rng)
            for feature in function.inputs}


def _example(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = np.zeros(shape, np.float16)
    if name == "write":
        values[..., 0, 0] = 1
    elif name == "keep":
        values[..., 1:] = 1
    elif name != "mask" and "cache" not in name:
        values[:] = rng.standard_normal(shape)
    return values
