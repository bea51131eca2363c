"""What a roster of experts does to held-out loss: samples times noise.

    scripts/measure_roster.py WORK [--passages 160] [--write]

The built-in model, fp16, masked routing, reference runtime. Passages of held-out source code; the
first half of each is context, and every token of the second half is taken as `generate --roster`
takes it. n samples are the first n of the most, so that all n share their noise. Losses are paired
by passage: t is of the mean difference from one undisturbed sample. `experts` are distinct ones
that a layer's samples of one token chose: what sparse routing would call. `--write` puts the table
into docs/research.md.
"""

import argparse
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from doc_page import PagePart
from train_demo import Settings, read_corpus

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import built_in
from ane_moe.formats.recipe import FP16
from ane_moe.loop.roster import RosterOptions, RosterSession, averaged
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.loop.tokenizer import load_tokenizer

SAMPLES = (2, 8, 32)
TAUS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
LENGTH = 32  # tokens of a passage
CONTEXT = 64
Sizes = tuple[int, ...]


def conversion(work: Path) -> Path:
    out = work / "roster"
    options = ConvertOptions(roster=True, prefill=max(SAMPLES), context=CONTEXT, recipe=FP16)
    convert(built_in(Path("demo")), out, options)
    return out


def passages(shards: LoadedShards, count: int) -> list[list[int]]:
    """Evenly out of all held-out files."""
    return passages_of(shards, "".join(read_corpus(Settings.held_out_percent).held_out), count)


def passages_of(shards: LoadedShards, text: str, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(shards.folder, shards.manifest)
    if tokenizer is None:
        raise SystemExit(f"{shards.folder} has no tokenizer")
    ids = tokenizer.encode(text)
    if len(ids) < LENGTH + count:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for {count} passages")
    starts = np.linspace(0, len(ids) - LENGTH, count).astype(int)
    return [ids[start : start + LENGTH] for start in starts]


def losses(
    shards: LoadedShards, texts: Sequence[Sequence[int]], options: RosterOptions, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """Nats a token of each passage `[passages, sizes]`, and distinct experts a layer and token
    `[sizes]`, for the first so many samples."""
    session, half = RosterSession(shards, options), LENGTH // 2
    slots = [f"gates.{layer}" for layer in shards.manifest.moe]
    lost, distinct = np.zeros((len(texts), len(sizes))), np.zeros(len(sizes))
    for number, ids in enumerate(texts):
        session.reset()
        session.prefill_logits(ids[: half - 1])
        for place in range(half - 1, LENGTH - 1):
            logits = session.samples(ids[place])
            lost[number] += [nats(averaged(logits[:n]), ids[place + 1]) for n in sizes]
            chosen = np.stack([session.slot(slot) > 0 for slot in slots])  # (L, E, n)
            distinct += [chosen[..., :n].any(-1).sum(1).mean() for n in sizes]
    return lost / half, distinct / half / len(texts)


def nats(logits: np.ndarray, identifier: int) -> float:
    highest = logits.max()
    return float(highest + np.log(np.exp(logits - highest).sum()) - logits[identifier])


def paired_t(differences: np.ndarray) -> float:
    return float(differences.mean() / differences.std(ddof=1) * math.sqrt(len(differences)))


def table(shards: LoadedShards, texts: Sequence[Sequence[int]]) -> list[str]:
    rows = ["| tau | samples | nats a token | change | t | experts |", "|" + "---:|" * 6]
    for tau in TAUS:
        options = RosterOptions(max(SAMPLES), tau, seed=0)
        lost, distinct = losses(shards, texts, options, (1, *SAMPLES))
        for place, n in enumerate(SAMPLES, start=1):
            change = lost[:, place] - lost[:, 0]
            rows.append(
                f"| {tau:g} | {n} | {lost[:, place].mean():.4f} | {change.mean():+.4f} "
                f"| {paired_t(change):+.1f} | {distinct[place]:.2f} |"
            )
        print("\n".join(rows[-len(SAMPLES) :]), flush=True)
    rows.append("")
    rows.append(
        f"One undisturbed sample: {lost[:, 0].mean():.4f} nats a token, {distinct[0]:.2f} experts "
        f"a layer. {len(texts)} passages of {LENGTH} tokens, CPython {platform.python_version()}'s "
        f"held-out sources, the second half of each scored; seed 0."
    )
    return rows


def write(lines: Sequence[str]) -> None:
    """The table between its markers in docs/research.md."""
    PagePart("research.md", "roster").write("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--passages", type=int, default=160)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    shards = load_shards(conversion(arguments.work), "reference")
    lines = table(shards, passages(shards, arguments.passages))
    print("\n".join(lines))
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
