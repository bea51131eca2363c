"""What pinning experts for a prompt costs: the loss of what follows, and agreement with the model.

    scripts/measure_pinning.py OUT TEXT [--passages 12] [--prompt 64] [--following 32]

OUT is a sparse conversion, TEXT what `ane-moe trace --text` takes. Each passage is a prompt, read
with all experts, and tokens that follow, which go in one by one. `agreement`: how often the most
likely token is the unpinned model's. Loads are of functions, in the tokens that follow.
"""

import argparse
from pathlib import Path

import numpy as np

from ane_moe.loop.pinning import PinnedSession, PinOptions
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.original.prompts import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--following", type=int, default=32)
    arguments = parser.parse_args()
    length = arguments.prompt + arguments.following
    texts = [ids[:length] for ids in read_prompts(arguments.text, arguments.out)]
    texts = [ids for ids in texts if len(ids) == length][: arguments.passages]
    experts = max(
        int(facts["experts"])
        for facts in load_shards(arguments.out, "reference").manifest.moe.values()
    )
    plain = None
    print("| pinned | chosen anew | nats a token | change | agreement | choices kept | loads |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for pinned, every in [(experts, None)] + [
        (count, every)
        for count in (3 * experts // 4, experts // 2, experts // 4)
        for every in (None, 8)
    ]:
        logits, kept, loads = read(
            arguments.out, texts, arguments.prompt, PinOptions(pinned, every)
        )
        plain = logits if plain is None else plain
        targets = np.concatenate([ids[arguments.prompt + 1 :] for ids in texts])
        lost, best = nats(logits, targets), nats(plain, targets)
        agreement = (logits.argmax(1) == plain.argmax(1)).mean()
        print(
            f"| {pinned} | {every or 'never'} | {lost:.3f} | {lost - best:+.3f} | {agreement:.1%} "
            f"| {kept:.1%} | {loads} |",
            flush=True,
        )


def read(
    out: Path, texts: list[list[int]], prompt: int, options: PinOptions
) -> tuple[np.ndarray, float, int]:
    """Logits of the tokens that follow but the last, the share of choices kept, and loads."""
    rows, kept, chosen, loads = [], 0, 0, 0
    for ids in texts:
        shards = load_shards(out, "reference")
        session: Session = PinnedSession(shards, options)
        session.prefill(ids[:prompt])
        assert shards.cache and session.figures.pinned
        before = shards.cache.figures.misses
        rows += [session.decode(identifier).copy() for identifier in ids[prompt:-1]]
        loads += shards.cache.figures.misses - before
        kept += session.figures.pinned.kept
        chosen += session.figures.pinned.chosen
    return np.stack(rows), kept / chosen, loads


def nats(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean loss of `targets [N]` by `logits [N,V]`."""
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    return float((np.log(np.exp(exact).sum(1)) - exact[np.arange(len(exact)), targets]).mean())


if __name__ == "__main__":
    main()
