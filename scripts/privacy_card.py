"""Measure the privacy filter and write its card. Used by train_privacy_demo.py, beside which it
lies."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from private_formats import Draw
from private_sentences import HELD_OUT, TRAINED, Sentence, Side, draw_sentence, mixed
from transformers import OpenAIPrivacyFilterForTokenClassification, PreTrainedTokenizerFast

from ane_moe.checkpoints.original_filter import KINDS
from ane_moe.files import write_text
from ane_moe.redaction.spans import probabilities, spans_of
from ane_moe.redaction.viterbi import PRESETS, Decoder

RECORD = "training.json"  # the record as data, kept in the checkpoint beside the card
SENTENCES = 1000  # of each set that is measured
SETS: dict[str, tuple[int, Side]] = {  # how the card words it -> seed, what is drawn
    "templates and formats as trained on, other draws": (101, TRAINED),
    "held-out templates, formats as trained on": (102, mixed(HELD_OUT, TRAINED)),
    "templates as trained on, held-out formats and locales": (103, mixed(TRAINED, HELD_OUT)),
    "held-out templates, held-out formats and locales": (104, HELD_OUT),
}
NEW = "templates and formats as trained on, other draws"
HARDEST = "held-out templates, held-out formats and locales"


@dataclass(frozen=True)
class Score:
    """Spans: those that agree in start, end and label, those found, those there are."""

    right: int
    found: int
    there: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.there if self.there else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.found + self.there) if self.found + self.there else 0.0


@dataclass(frozen=True)
class Result:
    """One set under one preset. `characters` is the share of private characters that some span
    covers, whatever its label: what redacting them depends on."""

    name: str
    preset: str
    spans: Score
    by_label: dict[str, Score]
    characters: float
    clean: float  # share of the sentences with nothing private in which nothing was found


@dataclass(frozen=True)
class Record:
    """All that the card says."""

    settings: dict[str, float]
    architecture: dict[str, Any]
    python: str
    torch: str
    transformers: str
    faker: str
    parameters: int
    cpu_seconds: float
    results: list[Result]


def sentences_of(name: str) -> list[Sentence]:
    """The sentences of one of SETS."""
    seed, side = SETS[name]
    draw = Draw(seed)
    return [draw_sentence(draw, side) for _ in range(SENTENCES)]


def measure(
    model: OpenAIPrivacyFilterForTokenClassification, tokenizer: PreTrainedTokenizerFast
) -> list[Result]:
    """Every set under the default decoder, and the hardest under every preset."""
    results = []
    for name in SETS:
        sentences = sentences_of(name)
        scored = [score(model, tokenizer, sentence.text) for sentence in sentences]
        for preset in PRESETS if name == HARDEST else ("default",):
            results.append(result_of(name, preset, sentences, scored, model.config.id2label))
    return results


@torch.inference_mode()
def score(
    model: OpenAIPrivacyFilterForTokenClassification, tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[list[tuple[int, int]], Any]:
    """Offsets [N] of the tokens, and scores [N, labels]."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    return encoded["offset_mapping"], model(input_ids=ids).logits[0].numpy()


def result_of(
    name: str,
    preset: str,
    sentences: Sequence[Sentence],
    scored: Sequence[tuple[list[tuple[int, int]], Any]],
    labels: dict[int, str],
) -> Result:
    decoder = Decoder(list(labels.values()), PRESETS[preset])
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("right", "found", "there")}
    private = covered = empty = clean = 0
    for sentence, (offsets, scores) in zip(sentences, scored, strict=True):
        path = decoder.decode(scores)
        names = [decoder.labels[one] for one in path]
        spans = spans_of(sentence.text, offsets, names, probabilities(scores, path))
        found = {(span.start, span.end, span.label) for span in spans}
        there = {(one.start, one.end, one.label) for one in sentence.entities}
        for kind, which in (("right", found & there), ("found", found), ("there", there)):
            counts[kind].update(label for _, _, label in which)
        hidden = {at for span in spans for at in range(span.start, span.end)}
        hides = [at in hidden for one in sentence.entities for at in range(one.start, one.end)]
        private, covered = private + len(hides), covered + sum(hides)
        empty, clean = empty + (not there), clean + (not there and not found)
    by_label = {label: Score(*(counts[kind][label] for kind in counts)) for label in KINDS}
    spans_of_all = Score(*(sum(counts[kind].values()) for kind in counts))
    return Result(name, preset, spans_of_all, by_label, covered / private, clean / empty)


CARD = """\
# The ane-moe demo privacy filter

A tiny privacy filter, small enough to ship with the package and really trained, so that its spans are real.
It serves to try `ane-moe redact` and to exercise conversion and verification. **It is no tool for protecting
people:** it knows the generated sentences it was trained on, and text of the world is not like them. For that, convert
a checkpoint that was trained for it.

| | |
|---|---|
| architecture | Hugging Face `openai_privacy_filter`, {parameters:,} parameters, weights saved in float16 |
| layers | {architecture[num_hidden_layers]}, d_model {architecture[hidden_size]}, \
{architecture[num_attention_heads]} query and {architecture[num_key_value_heads]} key/value heads of \
{architecture[head_dim]}, band of {architecture[sliding_window]} tokens on each side |
| experts | {architecture[num_local_experts]} per layer, top-{architecture[num_experts_per_tok]}, \
{architecture[intermediate_size]} wide |
| labels | O and B-, I-, E-, S- of the eight kinds of the published filter |
| tokenizer | byte-level BPE, {settings[vocabulary]} tokens, trained on the training texts |
| training texts | generated: Faker's entities in {locales} locales and formats of ours, in {templates} templates \
with choices in them, and records of keys; three sentences in ten hold nothing private |
| augmentation | texts in one case; in every other batch words cut otherwise (BPE-dropout {settings[merge_dropout]:g}) |
| training | {settings[steps]} AdamW steps of {settings[batch_texts]} texts of 1 to {settings[most_sentences]} \
sentences; {cpu_minutes:.0f} CPU minutes in all |
| learning rate | {settings[learning_rate]:g} after {settings[warmup_steps]} steps of warm-up, then a cosine |
| expert balance | Mixtral's auxiliary loss per layer, times {settings[balance_coefficient]:g} |
| made with | torch {torch}, transformers {transformers}, Faker {faker}, `scripts/train_privacy_demo.py` |

A date is private where a sentence tells it of somebody, not where code, a log or a release names it. The hard
negatives are version numbers, hashes, such dates, ports, addresses of machines, companies, cities, amounts.

## Held-out quality

Measured on the saved weights, with float32 arithmetic, on {sentences} sentences of each set. A span is right when its start,
its end and its label are. *Covered* is the share of private characters inside some span, whatever its label; *clean* the
share of sentences with nothing private in which nothing was found.

| sentences | decoder | precision | recall | F1 | covered | clean |
|---|---|---:|---:|---:|---:|---:|
{results}

By label, {hardest}, default decoder:

| label | precision | recall | F1 | spans |
|---|---:|---:|---:|---:|
{by_label}

Held-out templates share no five words in a row with the trained ones, though one hand wrote both. Held-out formats are other ways of writing the same
kinds (`+49 (0) 30 ...`, `the 3rd of May, 1987`, `xoxb-...`) and locales that Faker was never asked for in
training; names of `en_IN`, `da_DK`, `fi_FI`, `ro_RO`, `hu_HU` and `pt_PT`.
"""


def render_card(record: Record) -> str:
    """Fill the card in from the record alone."""
    hardest = next(one for one in record.results if one.name == HARDEST)
    return CARD.format(
        **vars(record) | {"results": "\n".join(map(result_row, record.results))},
        cpu_minutes=record.cpu_seconds / 60,
        sentences=SENTENCES,
        hardest=HARDEST,
        locales=len(set(TRAINED.locales)),
        templates=len(TRAINED.private) + len(TRAINED.clean),
        by_label="\n".join(label_row(*item) for item in hardest.by_label.items()),
    )


def result_row(result: Result) -> str:
    figures = (*percentages(result.spans), f"{result.characters:.1%}", f"{result.clean:.1%}")
    return f"| {result.name} | {result.preset} | {' | '.join(figures)} |"


def label_row(label: str, score: Score) -> str:
    return f"| {label} | {' | '.join(percentages(score))} | {score.there} |"


def percentages(score: Score) -> tuple[str, ...]:
    return tuple(f"{share:.1%}" for share in (score.precision, score.recall, score.f1))


def write_record(record: Record, folder: Path) -> None:
    """Write the record and the card made from it into the checkpoint folder."""
    write_text(folder / RECORD, json.dumps(asdict(record), indent=2) + "\n")
    write_text(folder / "README.md", render_card(record))
