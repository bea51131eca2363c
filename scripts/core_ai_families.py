"""Hold every family's conversion into Core AI's assets to Hugging Face's model and to the same
conversion for Core ML, over the tests' small models: the table of docs/coreai.md.

    python scripts/core_ai_families.py RESULTS.jsonl [FAMILY ...] [--write]

Each family is converted four times in fp16: for both, masked and sparse, with prefill of 16. All
are given the tokens that Hugging Face's fp32 model generates greedily after a prompt of 20. Random
models tie often, in routing too, and fp16 falls either way: the model is that of the first seed
with which all choices are decided. The masked conversion for Core ML, which is not what is judged,
tells: by exact sums and by the Neural Engine's coarser ones it has to do as Hugging Face does.
Families that are in RESULTS.jsonl are not done again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.conversion.pipeline import convert  # noqa: E402
from ane_moe.conversion.plan import ConvertOptions  # noqa: E402
from ane_moe.formats.recipe import FP16  # noqa: E402
from ane_moe.loop.labels import Labeller  # noqa: E402
from ane_moe.loop.session import Session  # noqa: E402
from ane_moe.loop.shards import load_shards  # noqa: E402
from ane_moe.manifest import read_manifest  # noqa: E402
from scripts.doc_page import PagePart  # noqa: E402
from tests.models import CONFIGS, make_model, save_checkpoint  # noqa: E402
from tests.zoo import NOTE  # noqa: E402

TABLE = PagePart("coreai.md", "families")
PROMPT = np.random.default_rng(0).integers(3, 211, 20).tolist()
MORE = 8
ENCODER = "openai_privacy_filter"  # each token's labels, all at once
# Its windows see all of a prompt, and in one call all tokens are a prompt.
BY_GENERATE = "unlimited_ocr"
ROUTINGS = ("masked", "sparse")
CORE_ML, CORE_AI = "mlpackage", "aimodel"
RUNTIMES = {CORE_ML: "reference", CORE_AI: "coreai"}
SEEDS = range(8)
COSINE = 0.9999  # of all scores of a token
# Least cosines by precision. What the engine's sums lose is some 1e-5, another expert over 1e-3.
FOLLOWS = {"fp32": COSINE, "engine": 0.999}
GAP = 2e-3  # between the best two scores, as a share of their spread: a rounding of fp16
CHOOSING = {"index_topk": 12, "index_n_heads": 8}
# Fewer tokens chosen than there are, so that indexers are in the graphs.
INDEXED: dict[str, dict[str, Any]] = {
    "axk2": CHOOSING,
    "deepseek_v32": CHOOSING,
    "dots3_note": {"text_config": NOTE | CHOOSING},
    "glm_moe_dsa": CHOOSING | {"num_hidden_layers": 2, "indexer_types": ["full", "full"]},
}
INDEXERS = " with indexers"
CASES = tuple(sorted((*CONFIGS, *(family + INDEXERS for family in INDEXED))))


@dataclass(frozen=True)
class Compared:
    """A model's conversion in both forms: least cosines of scores between each two of Hugging Face
    (`hf`), the packages (`ml`) and the assets (`ai`), over `tokens` of them; how many of these the
    assets choose as Hugging Face does, and as the packages do. `margin`: what the assets' choices
    lose by Hugging Face's scores, as a share of these scores' spread, at most. `assets`: how many
    there are."""

    case: str
    seed: int
    routing: str
    assets: int
    tokens: int
    as_hf: int
    as_ml: int
    margin: float
    hf_ml: float
    hf_ai: float
    ml_ai: float


@torch.no_grad()
def generated(model: PreTrainedModel, family: str) -> tuple[list[int], np.ndarray]:
    """Hugging Face's greedy ids, and the scores `[1 + MORE,V]` that they are of; of an encoder the
    prompt's labels, `[N,labels]`."""
    if family == ENCODER:
        return [], model(torch.tensor([PROMPT])).logits[0].double().numpy()
    ids, scores = list(PROMPT), []
    if family == BY_GENERATE:
        how = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        counts = {"max_new_tokens": MORE + 1, "min_new_tokens": MORE + 1}
        given = model.generate(torch.tensor([PROMPT]), **counts, **how)
        scores = [step[0].double().numpy() for step in given.logits]
        return given.sequences[0, len(PROMPT) :][:MORE].tolist(), np.array(scores)
    for _ in range(MORE + 1):
        scores.append(model(torch.tensor([ids])).logits[0, -1].double().numpy())
        ids.append(int(scores[-1].argmax()))
    return ids[len(PROMPT) : -1], np.array(scores)


@dataclass(frozen=True)
class Conversions:
    """Of one checkpoint, each made when asked for. `hf` are the model's own scores after the
    prompt and each of `ids`; the prompt is taken in by calls of `prefill` tokens (0: of one)."""

    prefill: int
    family: str
    folder: Path
    checkpoint: Path
    ids: list[int]
    hf: np.ndarray

    def out(self, routing: str, form: str) -> Path:
        return self.folder / f"{routing}-{form}"

    def follows(self, precision: str, cosine: float) -> bool:
        """Whether the masked conversion for Core ML does as Hugging Face does."""
        ml = self.scores("masked", CORE_ML, precision)
        same = bool((ml.argmax(-1) == self.hf.argmax(-1)).all())
        return same and least_cosine(ml, self.hf) > cosine

    def scores(self, routing: str, form: str, precision: str = "fp32") -> np.ndarray:
        """The same by a conversion."""
        out = self.out(routing, form)
        if not out.exists():
            shape: dict[str, Any] = {
                "prefill": self.prefill,
                "context": 64,
                "expert_tokens": (1, 16),
            }
            if self.family == ENCODER:
                shape = {"lengths": (32,), "expert_tokens": (1, 32)}
            how: dict[str, Any] = {"routing": routing, "format": form}
            convert(self.checkpoint, out, ConvertOptions(recipe=FP16, **shape, **how))
        options = {"precision": precision} if form == CORE_ML else {}
        shards = load_shards(out, RUNTIMES[form], **options)
        if shards.manifest.labels:
            return Labeller(shards).logits(PROMPT).astype(np.float64)
        session = Session(shards)
        found = [session.prefill(PROMPT).copy()]  # a session has one array for its scores
        found += [session.decode(token).copy() for token in self.ids]
        return np.array(found, np.float64)


def gap(scores: np.ndarray) -> float:
    """By how much the best score is better than the next one, as a share of all scores' spread, at
    least."""
    second, best = np.sort(scores, -1)[:, -2:].T
    return float(((best - second) / scores.std(-1)).min())


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float((np.sum(a * b, -1) / norms).min())


def decided(case: str, folder: Path, prefill: int) -> tuple[int, Conversions]:
    """The first seed of a model that decides everything (else the last one), and what is made."""
    family = case.removesuffix(INDEXERS)
    changes = INDEXED[family] if case != family else {}
    for seed in SEEDS:
        model = make_model(family, seed, **changes)
        here = folder / str(seed)
        checkpoint = save_checkpoint(model, here / "checkpoint")
        found = Conversions(prefill, family, here, checkpoint, *generated(model, family))
        if gap(found.hf) > GAP and all(found.follows(*one) for one in FOLLOWS.items()):
            break
    return seed, found


def compared(
    case: str, folder: Path, routings: Sequence[str] = ROUTINGS, prefill: int = 16
) -> Iterator[Compared]:
    """A row for each routing."""
    seed, conversions = decided(case, folder, prefill)
    hf = conversions.hf
    best = hf.argmax(-1)
    for routing in routings:
        ml, ai = (conversions.scores(routing, form) for form in RUNTIMES)
        chosen = ai.argmax(-1)
        lost = hf.max(-1) - np.take_along_axis(hf, chosen[:, None], -1)[:, 0]
        yield Compared(
            case=case,
            seed=seed,
            routing=routing,
            assets=len(read_manifest(conversions.out(routing, CORE_AI)).packages),
            tokens=len(hf),
            as_hf=int((best == chosen).sum()),
            as_ml=int((ml.argmax(-1) == chosen).sum()),
            margin=float((lost / hf.std(-1)).max()),
            hf_ml=least_cosine(hf, ml),
            hf_ai=least_cosine(hf, ai),
            ml_ai=least_cosine(ml, ai),
        )


def table(rows: Sequence[Compared]) -> str:
    """A line for each case, both routings in it."""
    head = "tokens | HF, Core ML's | HF, Core AI's | both"
    lines = [
        f"| family | seed | assets, masked and sparse | masked: {head} | sparse: {head} |",
        f"|{'---|' * 11}",
    ]
    by_case: dict[str, dict[str, Compared]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.routing] = row
    for case, found in sorted(by_case.items()):
        masked, sparse = (found[routing] for routing in ROUTINGS)
        facts = (case, str(masked.seed), f"{masked.assets}, {sparse.assets}")
        cells = (*facts, *cells_of(masked), *cells_of(sparse))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cells_of(row: Compared) -> list[str]:
    same = min(row.as_hf, row.as_ml)
    tokens = f"{same} of {row.tokens}"
    if row.as_hf < row.tokens:
        tokens += f", lost {row.margin:.1e}"
    # Cut, not rounded: what is not equal is not to look so.
    return [tokens, *(f"{int(one * 1e6) / 1e6:.6f}" for one in (row.hf_ml, row.hf_ai, row.ml_ai))]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    results: Path = arguments.results
    lines = results.read_text().splitlines() if results.is_file() else []
    rows = [Compared(**json.loads(line)) for line in lines]
    for case in arguments.families or CASES:
        if case in {row.case for row in rows}:
            continue
        with tempfile.TemporaryDirectory(prefix="coreai-") as folder:
            found = list(compared(case, Path(folder)))
        rows += found
        with results.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
        print(case, *(cells_of(row) for row in found), file=sys.stderr)
    if arguments.write:
        TABLE.write(table(rows))
    else:
        print(table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
