"""What meeting less often does to loss: tiny PT-MoE models and dense twins, trained alike.

    scripts/train_tracks.py [--steps 160] [--write]

Byte models of Python source code, by the reference model (original/pt_moe.py). All have 4 tracks of
8 layers; a dense twin has no experts, and MLPs as wide as the experts that a token goes through.
Depth 0 is the same model split by tensor parallelism: it synchronises after either half of a layer,
and its sum is the unsplit layer. Each model sees the same batches in the same order, from the same
seed. Loss is of held-out sources, in nats a byte, `t` of the differences by passage from the depth
above it in the table, for the same kind of layers. `--write` puts the table into docs/research.md.
"""

import argparse
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from time import process_time

import numpy as np
import torch
from demo_training import Descent, say
from doc_page import PagePart
from torch.nn import functional as F
from train_demo import Settings, read_corpus

from ane_moe.model.spec import Synchronisations, TrackSpec
from ane_moe.original.pt_moe import PtMoeConfig, PtMoeForCausalLM

TABLE = PagePart("research.md", "tracks")
TRACKS, LAYERS, DEPTHS = 4, 8, (0, 1, 2, 4, 8)
LENGTH, BATCH, PASSAGES = 64, 16, 256
KINDS = {"PT-MoE": ["dense", "sparse"] * (LAYERS // 2), "dense": ["dense"] * LAYERS}


@dataclass(frozen=True)
class Pace:
    steps: int
    warmup_steps: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


def model_of(kind: str, depth: int, seed: int) -> PtMoeForCausalLM:
    torch.manual_seed(seed)
    config = PtMoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_tracks=TRACKS,
        track_depth=depth,
        track_reduce="mean" if depth else "sum",
        num_attention_heads=2 * TRACKS,
        num_key_value_heads=TRACKS,
        head_dim=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=KINDS[kind],
        sliding_window=32,
        max_position_embeddings=LENGTH,
    )
    return PtMoeForCausalLM(config)


def batches(text: np.ndarray, steps: int, seed: int) -> Iterator[torch.Tensor]:
    random = np.random.default_rng(seed)
    for _ in range(steps):
        starts = random.integers(0, len(text) - LENGTH - 1, BATCH)
        yield torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(int))


def losses(model: PtMoeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Of each passage `[B]`, in nats a byte; `tokens` (B, T + 1)."""
    logits = model(tokens[:, :-1]).logits
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(1)


@torch.no_grad()
def held_out_losses(model: PtMoeForCausalLM, text: np.ndarray) -> np.ndarray:
    starts = np.linspace(0, len(text) - LENGTH - 1, PASSAGES).astype(int)
    passages = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(int))
    return torch.cat([losses(model, part) for part in passages.split(BATCH)]).numpy()


def synchronisations(depth: int) -> Synchronisations:
    if depth:
        return TrackSpec(TRACKS, depth, "mean").synchronisations(TRACKS * LAYERS)
    return Synchronisations(TRACKS, 2 * LAYERS, 2 * LAYERS)


def rows(steps: int, seed: int) -> Iterator[str]:
    corpus = read_corpus(Settings.held_out_percent)
    train, held_out = (
        np.frombuffer("".join(part).encode(), np.uint8) for part in (corpus.train, corpus.held_out)
    )
    yield "| layers | depth | synchronisations | saved | nats a byte | change | t |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for kind in KINDS:
        before = None
        for depth in DEPTHS:
            model, started = model_of(kind, depth, seed), process_time()
            descent = Descent(model, Pace(steps))
            for tokens in batches(train, steps, seed):
                descent.step(losses(model, tokens).mean())
            found, times = held_out_losses(model.eval(), held_out), synchronisations(depth)
            say(f"{kind} depth {depth}: {found.mean():.4f}, {process_time() - started:.0f} s")
            change = found - before if before is not None else None
            cells = ["", ""]
            if change is not None:
                t = change.mean() / (change.std(ddof=1) / math.sqrt(len(change)))
                cells = [f"{change.mean():+.4f}", f"{t:+.1f}"]
            yield (
                f"| {kind} | {depth} | {times.each_step} | {100 * times.saved:.4g} % | "
                f"{found.mean():.4f} | {cells[0]} | {cells[1]} |"
            )
            before = found
    yield ""
    weights = ", ".join(
        f"{kind} {sum(p.numel() for p in model_of(kind, 1, seed).parameters()):,}" for kind in KINDS
    )
    yield (
        f"Weights: {weights}. {steps} steps of {BATCH} x {LENGTH} bytes, one seed ({seed}); "
        f"{PASSAGES} passages of CPython {platform.python_version()}'s held-out sources."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in rows(asked.steps, asked.seed):
        print(line, flush=True)
        lines.append(line)
    if asked.write:
        TABLE.write("\n".join(lines))


if __name__ == "__main__":
    main()
