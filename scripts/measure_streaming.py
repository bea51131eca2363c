"""Stalls that the simulation predicts, beside those of the loop on a source that is slowed down.

    scripts/measure_streaming.py OUT TRACE [--read-ms 20] [--tokens 24] [--cache-share 0.5]

OUT is a sparse conversion, TRACE what `ane-moe trace` recorded with it. Every load of an expert
waits for --read-ms first, which takes no processor. The loop decodes the trace's first tokens with
an empty cache; the simulation is given what a layer took without waiting, and what a load took.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

from ane_moe.loop.eviction import DEFAULT_POLICY
from ane_moe.loop.expert_cache import ExpertCache
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.routing.cache_study import PREDICTORS, Machine, guessed, play
from ane_moe.routing.routing_trace import read_trace
from ane_moe.routing.traffic import function_calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--read-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--cache-share", type=float, default=0.5)
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace).first(arguments.tokens)
    calls = function_calls(trace)
    limit = int(arguments.cache_share * int(calls.sizes.sum()))
    print(
        f"{arguments.tokens} tokens, {arguments.read_ms:g} ms a load, load {os.getloadavg()[0]:.1f}"
    )
    print("| predictor | misses | predicted | late | predicted | stalled ms a token | predicted |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    experts = {layer: one.experts for layer, one in trace.layers.items()}
    for name in ("none", *PREDICTORS):
        shards = slowed(load_shards(arguments.out, "reference"), arguments.read_ms / 1000, limit)
        session = Session(shards, predictor=name)
        started = time.perf_counter()
        for identifier in trace.tokens.tolist():
            session.decode(identifier)
        passed = time.perf_counter() - started
        cache, steps = session.figures.cache, arguments.tokens * len(trace.layers)
        assert cache
        compute_ms = 1000 * (passed - cache.wait_seconds) / steps
        load_ms = 1000 * cache.load_seconds / cache.loads
        machine = Machine(compute_ms, 1e9, load_ms, 1, ahead_readers=1, channels=2)
        guesses = guessed(calls, PREDICTORS[name](experts)) if name in PREDICTORS else None
        row = play(calls, limit, DEFAULT_POLICY, machine, name, guesses)
        waited = 1000 * cache.wait_seconds / arguments.tokens
        print(
            f"| {name} | {cache.misses} | {row.misses} | {cache.late} | {row.late} | {waited:.1f} "
            f"| {row.stalled_ms_per_token:.1f} |",
            flush=True,
        )


def slowed(shards: LoadedShards, seconds: float, limit: int) -> LoadedShards:
    """The same shards over a cache whose loads take so much longer; a function counts with what the
    trace says, its weights as stored."""
    cache = shards.cache
    assert cache

    def load(key):  # type: ignore[no-untyped-def]
        time.sleep(seconds)
        return cache._load(key)

    sizes = {
        group.key(tokens): group.functions[tokens].weight_bytes
        for layer in shards.experts.values()
        for group in layer.all_groups
        for tokens in group.functions
    }
    return replace(shards, cache=ExpertCache(load, sizes.__getitem__, limit))


if __name__ == "__main__":
    main()
