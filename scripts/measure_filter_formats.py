"""Which weight formats keep a privacy filter's spans: print the table of docs/redact.md, or put it
there.

    python scripts/measure_filter_formats.py [--write]

Spans of the shards against those of Hugging Face's own model in fp32, behind the same decoder, on
1,000 sentences that it was not trained on; F1 of both against what is private in them. Where spans
differ, the original's *preference* is how much more its scores give its own labels than the
shards', in nats: near zero, two readings are as good as equal to it.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from doc_page import PagePart
from transformers import AutoModelForTokenClassification

from ane_moe import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.demo import privacy_checkpoint
from ane_moe.formats.recipe import find_recipe
from ane_moe.redaction.redactor import Redactor, open_redactor
from ane_moe.redaction.spans import probabilities, spans_of
from ane_moe.redaction.viterbi import Decoder
from ane_moe.redaction.windows import scores_of_all

ROOT = Path(__file__).resolve().parents[1]
TABLES = PagePart("redact.md", "formats")
SENTENCES = (
    ROOT / "tests" / "demo" / "new_sentences.jsonl",
    ROOT / "tests" / "demo" / "held_out_sentences.jsonl",
)
FORMATS = {  # as the table words them -> recipe, routings
    "fp16": ("fp16", ("masked", "sparse")),
    "int8, linear": ("int8", ("masked", "sparse")),
    "int8, palette of 256 for 16 channels": ("lut8-g16", ("masked",)),
    "6 bit, palette for 16 channels": ("lut6", ("masked",)),
    "4 bit, palette for 16 channels": ("lut4", ("masked",)),
}
Places = frozenset[tuple[int, int, str]]


@dataclass(frozen=True)
class Scored:
    """A sentence as one model scores it: `logits` `[N, labels]`, its best legal path, its spans."""

    logits: np.ndarray
    path: np.ndarray
    places: Places


@dataclass(frozen=True)
class Row:
    """Shards against the original. `both` and `spans` count spans of the two together;
    `preferences` are the original's where sentences differ."""

    name: str
    routing: str
    weight_bytes: int
    both: int
    spans: int
    f1_of_truth: float
    preferences: tuple[float, ...]


class Sentences:
    """Sentences, what is private in them, and a tokenizer and a decoder for all models."""

    def __init__(self, path: Path, redactor: Redactor) -> None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.texts = [row["text"] for row in rows]
        self.truth = [frozenset(tuple(one.values()) for one in row["entities"]) for row in rows]
        self.encoded = [redactor.tokenizer.encode_with_offsets(text) for text in self.texts]
        self.decoder = Decoder(redactor.scorer.labels)

    def scored(self, logits: Iterable[np.ndarray]) -> list[Scored]:
        """What logits for each sentence give."""
        return [
            self._scored(text, offsets, scores)
            for text, (_, offsets), scores in zip(self.texts, self.encoded, logits, strict=True)
        ]

    def _scored(self, text: str, offsets: Sequence[tuple[int, int]], scores: np.ndarray) -> Scored:
        path = self.decoder.decode(scores)
        names = [self.decoder.labels[one] for one in path]
        spans = spans_of(text, offsets, names, probabilities(scores, path))
        return Scored(scores, path, frozenset((one.start, one.end, one.label) for one in spans))

    def f1(self, found: Sequence[Scored]) -> float:
        """Against what is private."""
        pairs = list(zip(found, self.truth, strict=True))
        right = sum(len(one.places & there) for one, there in pairs)
        return 2 * right / sum(len(one.places) + len(there) for one, there in pairs)


@torch.inference_mode()
def original_logits(checkpoint: Path, ids: Iterable[list[int]]) -> Iterator[np.ndarray]:
    """Of Hugging Face's model in fp32."""
    model = AutoModelForTokenClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for one in ids:
        yield model(input_ids=torch.tensor([one])).logits[0].numpy()


def preference(original: Scored, other: Scored) -> float:
    """How much more the original's scores give its own path than the other's."""
    rows = np.arange(len(original.path))
    own, others = original.logits[rows, original.path], original.logits[rows, other.path]
    return float(own.sum() - others.sum())


def measured(sentences: Sentences, original: list[Scored], out: Path, name: str) -> Row:
    """The shards in `out` against the original."""
    redactor = open_redactor(out)
    manifest = redactor.scorer.manifest  # type: ignore[attr-defined]  # a Labeller
    ids = [one for one, _ in sentences.encoded]
    found = sentences.scored(scores_of_all(redactor.scorer, ids))
    pairs = list(zip(original, found, strict=True))
    return Row(
        name,
        manifest.routing,
        sum(shard.weight_bytes for shard in manifest.shards),
        sum(len(a.places & b.places) for a, b in pairs),
        sum(len(a.places) + len(b.places) for a, b in pairs),
        sentences.f1(found),
        tuple(preference(a, b) for a, b in pairs if a.places != b.places),
    )


def table(rows: Sequence[Row], original_f1: float) -> str:
    """Markdown."""
    lines = [
        "| weights | routing | MB | same spans | sentences that differ | largest preference there "
        "| F1 of what is private |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| Hugging Face, fp32 | | | | | | {original_f1:.2%} |",
    ]
    for row in rows:
        largest = f"{max(row.preferences):.2g} nats" if row.preferences else ""
        lines.append(
            f"| {row.name} | {row.routing} | {row.weight_bytes / 1e6:.2f} "
            f"| {2 * row.both / row.spans:.2%} | {len(row.preferences)} | {largest} "
            f"| {row.f1_of_truth:.2%} |"
        )
    return "\n".join(lines)


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="A filter. [default: the demo]")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the tables into the page.")] = False,
) -> None:
    """Convert the filter in each format, and compare spans."""
    torch.set_num_threads(1)
    source = checkpoint or privacy_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        outs = []
        for name, (recipe, routings) in FORMATS.items():
            for routing in routings:
                out = Path(scratch) / f"{recipe}-{routing}"
                convert(source, out, ConvertOptions(routing=routing, recipe=find_recipe(recipe)))
                outs.append((name, out))
        text = "\n\n".join(
            _tables(source, path, outs, open_redactor(outs[0][1])) for path in SENTENCES
        )
    if write:
        TABLES.write(text)
    print(text)


def _tables(source: Path, path: Path, outs: list[tuple[str, Path]], redactor: Redactor) -> str:
    sentences = Sentences(path, redactor)
    original = sentences.scored(original_logits(source, (ids for ids, _ in sentences.encoded)))
    rows = [measured(sentences, original, out, name) for name, out in outs]
    title = {"new": "New sentences of the trained kinds", "held_out": "Held-out kinds"}
    heading = f"{title[path.stem.removesuffix('_sentences')]}, {len(sentences.texts):,} sentences:"
    return f"{heading}\n\n{table(rows, sentences.f1(original))}"


if __name__ == "__main__":
    typer.run(main)
