"""Hit rates, wasted bytes and the host's time of the predictors of experts, on a sparse conversion.

    scripts/measure_prefetch.py OUT [--tokens 200] [--cache-share 0.25] [--rounds 3]

Every prompt is prefilled and decoded greedily, once for each predictor that OUT allows (`adapter`
and `shard`: converted with --early), each time with an empty expert cache that holds a share of all
decode functions. A guess right: an expert that was needed had been named. Bytes unused: loaded
ahead and not called before they had to leave. What the cache finds loaded depends on the machine's
speed, since loads run beside the calls; guesses do not. Rounds take turns, and of times the least
is told: of the thread that guesses, a guess, and of the host outside of calls, a token (with
--cache-share 8, where nothing is loaded beside it once all has been).

Then the same guess at another width, of drawn numbers: --geometry 2048,128,8,24 is d, experts of a
layer, of a token, and rank.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ane_moe.early_adapters import Adapter
from ane_moe.loop.figures import CacheFigures
from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.prefetch import (
    BY_SHARD,
    PREDICTORS,
    Predictor,
    RouterAhead,
    ShardScores,
    guesses_of,
)
from ane_moe.loop.router_table import Chooser, RouterTable
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.loop.tokenizer import load_tokenizer
from ane_moe.manifest import read_manifest

PROMPTS = (
    "def __init__(self, name, value):\n",
    "import os\nimport sys\n\n\ndef main",
    "class TestCase(unittest.TestCase):\n    def test_",
    "    for key, value in sorted(items.items()):\n",
)
BY_EARLY = ("adapter", BY_SHARD)


class Timed(Predictor):
    """A predictor, and what its guesses took of their thread."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self.reads = predictor, predictor.reads
        self.nanoseconds = self.guesses = 0

    def predict(self, layer: int, hidden: np.ndarray | None) -> Sequence[int]:
        started = time.thread_time_ns()
        experts = self._predictor.predict(layer, hidden)
        if hidden is not None:
            self.nanoseconds += time.thread_time_ns() - started
            self.guesses += 1
        return experts

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._predictor.observe(layer, experts)


@dataclass
class Found:
    """Of one predictor in one round; the host's seconds are of the prompts after the first."""

    cache: CacheFigures
    needed: int = 0
    right: int = 0
    predicted: int = 0
    guess_us: float = 0.0
    host_ms: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=200, help="new tokens over all prompts")
    parser.add_argument(
        "--cache-share", type=float, default=0.25, help="of the functions for one token"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--geometry", default="2048,128,8,24")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    limit = int(arguments.cache_share * decode_bytes(load_shards(arguments.out, "reference")))
    print(
        f"{arguments.tokens} tokens after {len(PROMPTS)} prompts, cache {limit / 1e6:.2f} MB "
        f"({arguments.cache_share:.0%} of all functions for one token), reference runtime, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    early = bool(guesses_of(read_manifest(arguments.out)))
    names = [name for name in PREDICTORS if early or name not in BY_EARLY]
    tokens = arguments.tokens // len(PROMPTS)
    rounds = [
        {name: measure(arguments.out, name, limit, tokens) for name in names}
        for _ in range(arguments.rounds)
    ]
    for name in names:
        print(line(name, [one[name] for one in rounds]))
    print(of_geometry(*map(int, arguments.geometry.split(","))))


def decode_bytes(shards: LoadedShards) -> int:
    """Memory of every function for one token."""
    assert shards.cache
    return sum(
        shards.cache.resident_bytes(group.key(min(group.functions)))
        for layer in shards.experts.values()
        for group in layer.all_groups
    )


def measure(out: Path, predictor: str, limit: int, tokens: int) -> Found:
    """All prompts, once."""
    shards = load_shards(out, "reference", expert_cache_bytes=limit)
    tokenizer = load_tokenizer(out, shards.manifest)
    assert tokenizer and shards.cache
    found, timed, host, taken = Found(shards.cache.figures), [], 0.0, 0
    for number, prompt in enumerate(PROMPTS):
        session = Session(shards, predictor=predictor)
        if session._prefetch:
            session._prefetch._predictor = Timed(session._prefetch._predictor)
            timed.append(session._prefetch._predictor)
        for _ in generate(session, tokenizer.encode(prompt), GenerateOptions(max_tokens=tokens)):
            pass
        if guesses := session.figures.prefetch:
            found.needed += guesses.needed
            found.right += guesses.right
            found.predicted += guesses.predicted
        if number:
            host += session.figures.decode.host_seconds
            taken += session.figures.decode.tokens
    shards.cache.settle()
    found.host_ms = 1e3 * host / max(1, taken)
    guesses_made = sum(one.guesses for one in timed)
    found.guess_us = sum(one.nanoseconds for one in timed) / 1e3 / max(1, guesses_made)
    return found


def line(name: str, rounds: Sequence[Found]) -> str:
    """One predictor: guesses of any round, the cache of the last, the least of times."""
    last, cache = rounds[-1], rounds[-1].cache
    guessed = (
        f"{last.right / last.needed:6.1%} of needed experts guessed, "
        f"{last.right / last.predicted:6.1%} of guesses right, "
        f"{min(one.guess_us for one in rounds):5.1f} us a guess"
        if last.needed
        else "no guesses"
    )
    return (
        f"{name:9} {guessed}; host {min(one.host_ms for one in rounds):.3f} ms a token; cache hits "
        f"{cache.hit_rate:6.1%}, waited {cache.wait_seconds:.2f} s, "
        f"{cache.bytes_loaded / 1e6:.1f} MB loaded, {cache.bytes_unused / 1e6:.1f} MB of it unused"
    )


def of_geometry(d: int, experts: int, k: int, rank: int) -> str:
    """A guess by each way at this width, microseconds, in turn."""
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    router = {0: RouterTable(drawn(experts, d), Chooser(experts, k))}
    adapted = RouterAhead(router, {0: Adapter(drawn(d, rank), drawn(rank, d))})
    ways: dict[str, tuple[Predictor, np.ndarray]] = {
        "router": (RouterAhead(router), drawn(d).astype(np.float16)),
        "adapter": (adapted, drawn(d).astype(np.float16)),
        BY_SHARD: (ShardScores({0: Chooser(experts, k)}), drawn(experts).astype(np.float16)),
    }
    calls: dict[str, Callable[[], Sequence[int]]] = {
        name: lambda way=way, given=given: way.predict(0, given)
        for name, (way, given) in ways.items()
    }
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(20):
        for name, call in calls.items():
            started = time.thread_time_ns()
            for _ in range(100):
                call()
            least[name] = min(least[name], (time.thread_time_ns() - started) / 1e5)
    shown = ", ".join(f"{name} {taken:.1f}" for name, taken in least.items())
    return f"d {d}, {experts} experts, {k} a token, rank {rank}: us a guess: {shown}"


if __name__ == "__main__":
    main()
