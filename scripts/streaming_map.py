"""When reading experts from disk pays: a map of read speed, cache hits and guesses, simulated.

    scripts/streaming_map.py [--write]

The shape is Flash-MoE's: 60 layers of 1.87 ms, 4 experts of 7,077,888 bytes a token and layer, read
4 at once. Everything is predicted by ane_moe/forecast/streaming.py; `--write` puts it into
docs/streaming.md.
"""

import argparse

from doc_page import PagePart

from ane_moe.forecast.streaming import simulate
from ane_moe.loop.layer_times import LayerTimes

TABLE = PagePart("streaming.md", "map")
LAYERS, COMPUTE_MS, K, EXPERT_BYTES = 60, 1.87, 4, 7_077_888
SPEEDS = (3, 6, 11.7, 24)  # 10^9 bytes a second of the disk
HITS = (0.0, 0.5, 0.7, 0.9, 0.97)
ACCURACIES = (0.25, 0.53, 0.8, 0.9, 0.97, 1.0)
RATIOS = (0.25, 0.5, 1.0, 1.29, 2.0, 4.0)  # of read to compute
CONTENTIONS = (0.0, 0.73)


def speeds() -> str:
    """Tokens a second, on demand."""
    lines = [
        f"| disk | {' | '.join(f'{hit:.0%} hits' for hit in HITS)} |",
        f"|---|{'---:|' * len(HITS)}",
    ]
    for speed in SPEEDS:
        times = LayerTimes(COMPUTE_MS, K * EXPERT_BYTES / speed / 1e6, K, K, K)
        found = (1000 / simulate(times, LAYERS, resident=hit).token_ms for hit in HITS)
        lines.append(f"| {speed:g} GB/s | {' | '.join(f'{rate:.1f}' for rate in found)} |")
    return "\n".join(lines)


def gains() -> str:
    """Loading ahead beside loading on demand, nothing resident."""
    head = " | ".join(f"{accuracy:.0%}" for accuracy in ACCURACIES)
    lines = [f"| contention | read / compute | {head} |", f"|---|---|{'---:|' * len(ACCURACIES)}"]
    for contention in CONTENTIONS:
        for ratio in RATIOS:
            times = LayerTimes(1.0, ratio, K, K, K, contention)
            demand = simulate(times, LAYERS).token_ms
            cells = (
                f"{demand / simulate(times, LAYERS, accuracy=accuracy).token_ms:.2f}"
                for accuracy in ACCURACIES
            )
            lines.append(f"| {contention:g} | {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put it into docs/streaming.md")
    arguments = parser.parse_args()
    text = (
        f"Tokens a second on demand, by what the disk reads and what the cache holds "
        f"({1000 / LAYERS / COMPUTE_MS:.1f} with everything in memory):\n\n{speeds()}\n\n"
        "How many times as fast with experts loaded one layer ahead, by how often a guess is right "
        f"(nothing in the cache, {K} experts, all read at once):\n\n{gains()}"
    )
    print(text)
    if arguments.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
