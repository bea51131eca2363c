"""Hit rates and wasted bytes of the predictors of experts, on a sparse conversion.

    scripts/measure_prefetch.py OUT [--tokens 200] [--cache-share 0.25]

Every prompt is prefilled and decoded greedily, once for each predictor, each time with an empty
expert cache that holds a share of all decode functions. A guess right: an expert that was needed
had been named. Bytes unused: loaded ahead and not called before they had to leave. What the cache
finds loaded depends on the machine's speed, since loads run beside the calls; guesses do not.
"""

import argparse
import os
from pathlib import Path

from ane_moe.loop.generation import GenerateOptions, generate
from ane_moe.loop.prefetch import PREDICTORS
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.loop.tokenizer import load_tokenizer

PROMPTS = (
    "def __init__(self, name, value):\n",
    "import os\nimport sys\n\n\ndef main",
    "class TestCase(unittest.TestCase):\n    def test_",
    "    for key, value in sorted(items.items()):\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=200, help="new tokens over all prompts")
    parser.add_argument(
        "--cache-share", type=float, default=0.25, help="of the functions for one token"
    )
    arguments = parser.parse_args()
    limit = int(arguments.cache_share * decode_bytes(load_shards(arguments.out, "reference")))
    print(
        f"{arguments.tokens} tokens after {len(PROMPTS)} prompts, cache {limit / 1e6:.2f} MB "
        f"({arguments.cache_share:.0%} of all functions for one token), reference runtime, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for name in PREDICTORS:
        print(measure(arguments.out, name, limit, arguments.tokens // len(PROMPTS)))


def decode_bytes(shards: LoadedShards) -> int:
    """Memory of every function for one token."""
    assert shards.cache
    return sum(
        shards.cache.resident_bytes(group.key(min(group.functions)))
        for layer in shards.experts.values()
        for group in layer.all_groups
    )


def measure(out: Path, predictor: str, limit: int, tokens: int) -> str:
    """One line of figures for all prompts."""
    shards = load_shards(out, "reference", expert_cache_bytes=limit)
    tokenizer = load_tokenizer(out, shards.manifest)
    assert tokenizer and shards.cache
    needed = right = predicted = 0
    for prompt in PROMPTS:
        session = Session(shards, predictor=predictor)
        for _ in generate(session, tokenizer.encode(prompt), GenerateOptions(max_tokens=tokens)):
            pass
        if guesses := session.figures.prefetch:
            needed, right, predicted = (
                needed + guesses.needed,
                right + guesses.right,
                predicted + guesses.predicted,
            )
    shards.cache.settle()
    cache = shards.cache.figures
    guessed = (
        f"{right / needed:6.1%} of needed experts guessed, {right / predicted:6.1%} of guesses "
        f"right"
        if needed
        else "no guesses"
    )
    return (
        f"{predictor:9} {guessed}; cache hits {cache.hit_rate:6.1%}, waited "
        f"{cache.wait_seconds:.2f} s, "
        f"{cache.bytes_loaded / 1e6:.1f} MB loaded, {cache.bytes_unused / 1e6:.1f} MB of it unused"
    )


if __name__ == "__main__":
    main()
