"""How fast one process encodes weights in each format: MB of fp16 weights a second, on this
machine.

    python scripts/bench_encoding.py [FORMAT ...]

The figures of ane_moe/forecast/conversion_cost.toml come from here.
"""

import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ane_moe.formats.recipe import find_format

SIDE = 2048
ROUNDS = 3


def megabytes_a_second(name: str) -> float:
    """Median over rounds, after one that does not count."""
    weight = (np.random.default_rng(0).standard_normal((SIDE, SIDE)) * 0.02).astype(np.float16)
    form, taken = find_format(name), []
    form.encode(weight)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        form.encode(weight)
        taken.append(time.perf_counter() - start)
    return weight.nbytes / 1e6 / statistics.median(taken)


def main() -> None:
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch "
        f"{version('torch')}, "
        f"a random matrix of {SIDE} x {SIDE}, median of {ROUNDS} after one"
    )
    for name in sys.argv[1:] or ["int8", "lut4", "lut3", "lut2", "apple2"]:
        print(f"{name}: {megabytes_a_second(name):.0f} MB/s")


if __name__ == "__main__":
    main()
