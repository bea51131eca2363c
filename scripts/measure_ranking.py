"""What scores, biases and groups are worth to guesses of experts: DeepSeek-V3's router, on random
weights and random tokens, and on the small model that scripts/measure_predictors.py trains in WORK
and the passages that it is judged by.

    scripts/measure_ranking.py WORK [--rank 24] [--write]

`--write` puts the tables into docs/streaming.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.loop.router_table import RouterTable, read_routers  # noqa: E402
from ane_moe.loop.shards import load_shards  # noqa: E402
from ane_moe.routing.alignment import fit_adapter, recall  # noqa: E402
from ane_moe.routing.residuals import Residuals, record_residuals  # noqa: E402
from scripts.doc_page import PagePart  # noqa: E402
from tests.models import make_model, save_checkpoint  # noqa: E402
from tests.verification.tiny import tiny_conversion  # noqa: E402

TABLE = PagePart("streaming.md", "ranking")
PASSAGES, PASSAGE = 24, 128
COMMON = {"num_hidden_layers": 5, "max_position_embeddings": 256}
WIDER = {
    "hidden_size": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
}
MODELS = {
    "12 experts, 3 chosen, 2 of 4 groups open": COMMON,
    "32 experts, 4 chosen, 4 of 8 groups open": COMMON | WIDER,
}
TRAINED = "trained: 16 experts, 2 chosen, 2 of 4 groups open"
RANKED_BY = ("logits alone", "score and bias", "and open groups")
AHEAD = (0, 1, 2)


def ways(router: RouterTable, state: np.ndarray) -> Mapping[str, np.ndarray]:
    """What experts are ranked by, `[N,E]`."""
    scores = router.scores(state)
    ranked = (state @ router.weights.T, scores, router.chooser.eligible(scores))
    return dict(zip(RANKED_BY, ranked, strict=True))


def recalls(
    heard: Residuals, routers: Mapping[int, RouterTable], ahead: int, rank: int
) -> dict[tuple[str, str], str]:
    """Of k guesses and of 2 k, by predictor and ranking: means over layers."""
    layers = list(heard.entering)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for layer, meant in zip(layers, layers[ahead:], strict=False):
        x, y, router = heard.entering[layer], heard.entering[meant], routers[meant]
        cut = 2 * len(x) // 3
        adapted = fit_adapter(x[:cut], y[:cut], rank)(x[cut:])
        chosen, k = heard.chosen[meant][cut:], router.chooser.k
        for name, state in (("router", router.read(x[cut:])), ("adapter", adapted)):
            for ranked_by, scores in ways(router, state).items():
                pair = recall(scores, chosen, k), recall(scores, chosen, 2 * k)
                found.setdefault((name, ranked_by), []).append(pair)
    means = {key: np.mean(own, axis=0) for key, own in found.items()}
    return {key: f"{once:.1%}, {twice:.1%}" for key, (once, twice) in means.items()}


def heard_of(sizes: Mapping[str, int]) -> tuple[Residuals, Mapping[int, RouterTable]]:
    """What random texts are inside of a random model, and its routers."""
    random, model = np.random.default_rng(0), make_model("deepseek_v3", **sizes)
    last = model.config.vocab_size - 1
    texts = [random.integers(3, last, PASSAGE).tolist() for _ in range(PASSAGES)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(model, Path(folder, "checkpoint"))
        shape = {"routing": "sparse", "prefill": 32, "expert_tokens": (1, 32)}
        shards = load_shards(tiny_conversion(checkpoint, Path(folder, "out"), **shape), "reference")
        return record_residuals(shards, texts), read_routers(shards.folder, shards.manifest)


def heard_in(work: Path) -> tuple[Residuals, Mapping[int, RouterTable]]:
    """The same of the trained model's conversion and its passages."""
    shards = load_shards(work / "biased-sparse", "reference")
    texts = json.loads((work / "biased-sparse.json").read_text())
    return record_residuals(shards, texts), read_routers(shards.folder, shards.manifest)


def table(title: str, by: Mapping[int, Mapping[tuple[str, str], str]]) -> str:
    lines = [f"| {title} | {' | '.join(RANKED_BY)} |", f"|---|{'---:|' * len(RANKED_BY)}"]
    for name in ("router", "adapter"):
        for far in by:
            cells = (by[far][name, ranked_by] for ranked_by in RANKED_BY)
            lines.append(f"| `{name}`, {far} ahead | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--write", action="store_true", help="put it into docs/streaming.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {title: heard_of(sizes) for title, sizes in MODELS.items()}
    models[TRAINED] = heard_in(arguments.work)
    tables = []
    for title, (heard, routers) in models.items():
        by = {far: recalls(heard, routers, far, arguments.rank) for far in AHEAD}
        tables.append(table(title, by))
    text = "\n\n".join(tables)
    print(text)
    if arguments.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
