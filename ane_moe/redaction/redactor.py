"""Redactor: a tokenizer, scores of labels and a decoder together; text in, spans and redacted text
out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.labels import Labeller
from ane_moe.loop.shards import load_shards
from ane_moe.loop.tokenizer import Tokenizer, load_tokenizer
from ane_moe.manifest import read_manifest
from ane_moe.redaction.documents import Piece
from ane_moe.redaction.placeholders import DEFAULT, Numbered, Placeholders, Plain, Template
from ane_moe.redaction.spans import Offsets, Span, find_kinds, kinds_of, probabilities, spans_of
from ane_moe.redaction.viterbi import OUTSIDE, PRESETS, Biases, Decoder, read_biases
from ane_moe.redaction.windows import Scorer, is_exact, scores_of_all

MARGIN = 2048  # characters that a piece of a long unit sees of its neighbours


@dataclass(frozen=True)
class Token:
    """Characters `start` to `end` of a text, which may overlap its neighbours', and its BIOES
    label."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Passage:
    """A part of a document, from its character `at` on, and what was found: `tokens` and `spans`
    are in characters of `text`."""

    text: str
    at: int
    tokens: tuple[Token, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Marked:
    """A passage whose spans have got placeholders."""

    passage: Passage
    spans: tuple[Span, ...]
    placeholders: tuple[str, ...]

    @property
    def redacted(self) -> str:
        """The text with placeholders in the spans' places."""
        text, parts, last = self.passage.text, [], 0
        for span, placeholder in zip(self.spans, self.placeholders, strict=True):
            parts += [text[last : span.start], placeholder]
            last = span.end
        return "".join([*parts, text[last:]])


@dataclass(frozen=True)
class Redacted:
    """A text without what was found in it. `spans` are in characters of the original,
    `placeholders` what stands for each; `table` gives the original's texts by numbered
    placeholder."""

    text: str
    spans: tuple[Span, ...]
    placeholders: tuple[str, ...]
    table: dict[str, str]


class Redactor:
    """Finds spans in texts. `labels` are the kinds of spans that are looked for; `approximate` says
    whether a text was longer than the functions can take without a trace of the windows."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        labels: Sequence[str] | None = None,
        biases: Biases = PRESETS["default"],
    ) -> None:
        """`labels`: in full or short (`email` for `private_email`), None for all. Raises UserError
        for a label that the model has not, and labels that are not BIOES."""
        self.scorer, self.tokenizer = scorer, tokenizer
        self._decoder = Decoder(scorer.labels, biases)
        kinds = kinds_of(scorer.labels)
        wanted = find_kinds(kinds if labels is None else labels, scorer.labels)
        self.labels = tuple(kind for kind in kinds if kind in wanted)
        self.approximate = False

    def find(self, text: str) -> Passage:
        """What is in `text`, spans in order and apart. Raises UserError for lone surrogates."""
        (found,) = self.find_all([text])
        return found

    def find_all(self, texts: Sequence[str]) -> Iterator[Passage]:
        """What is in each text by itself: as `find`, faster for many short ones."""
        encoded = [self._encoded(text) for text in texts]
        scored = scores_of_all(self.scorer, [ids for ids, _ in encoded])
        for text, (ids, offsets), scores in zip(texts, encoded, scored, strict=True):
            self.approximate |= len(ids) > max(self.scorer.lengths) and not is_exact(self.scorer)
            yield self._passage(text, offsets, scores)

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets; none of white space."""
        _refuse_surrogates(text)
        return self.tokenizer.encode_with_offsets(text) if text.strip() else ([], [])

    def _passage(self, text: str, offsets: Offsets, scores: np.ndarray) -> Passage:
        path = self._decoder.decode(scores)
        found = (self._decoder.labels[one] for one in path)
        names = [name if name[2:] in self.labels else OUTSIDE for name in found]
        tokens = (Token(*pair, name) for pair, name in zip(offsets, names, strict=True))
        spans = spans_of(text, offsets, names, probabilities(scores, path))
        return Passage(text, 0, tuple(tokens), spans)

    def passages(self, batches: Iterable[Sequence[Piece]]) -> Iterator[Passage]:
        """The passages of a document that comes in batches of pieces; together they are its text.

        A unit that comes in one piece is looked at by itself, those of a batch in few calls. A
        piece of a longer one is looked at with MARGIN characters of its neighbours, and ends at
        white space where no span lies.
        """
        at, before, held, parted = 0, "", "", False
        for batch in batches:
            for whole, group in groupby(_noted(batch, parted), key=lambda noted: noted[1]):
                run = [piece for piece, _ in group]
                if whole:
                    for found in self.find_all([piece.text for piece in run]):
                        yield replace(found, at=at)
                        at += len(found.text)
                    continue
                for piece in run:
                    found = self.find(before + held + piece.text)
                    text, done = found.text, len(before)
                    end = len(text) if piece.ends else _settled(found, done)
                    yield _part(found, done, end, at)
                    at += end - done
                    before, held = text[max(0, end - MARGIN) : end], text[end:]
                    if piece.ends:
                        before, held = "", ""
            parted = not batch[-1].ends if batch else parted


def open_redactor(
    folder: Path,
    labels: Sequence[str] | None = None,
    biases: Biases | None = None,
    runtime: str = "auto",
) -> Redactor:
    """The redactor of the conversion in `folder`; `biases` None: the model's own. Raises
    UserError."""
    manifest = read_manifest(folder)
    if not manifest.labels:
        raise UserError(
            f"{folder} gives no labels",
            f"a conversion of {manifest.family}",
            "give the conversion of a token classifier",
        )
    tokenizer = load_tokenizer(folder, manifest)
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer",
            "the checkpoint had none",
            "convert again with its tokenizer.json beside the weights",
        )
    find_kinds(labels or (), manifest.labels)  # before shards are loaded
    chosen = read_biases(folder) if biases is None else biases
    return Redactor(Labeller(load_shards(folder, runtime)), tokenizer, labels, chosen)


def redact(
    shards: str | Path | Redactor,
    text: str,
    *,
    labels: Sequence[str] | None = None,
    placeholder: str = DEFAULT,
    numbered: bool = False,
    runtime: str = "auto",
) -> Redacted:
    """Find what is private in `text`, and put placeholders in its place.

    `shards` is the folder of a conversion, or a Redactor, which is worth keeping: opening one loads
    the shards, and `labels` and `runtime` are its own. Everything outside the spans is as it was.
    Raises UserError.
    """
    if not isinstance(shards, Redactor):
        shards = open_redactor(Path(shards), labels, runtime=runtime)
    template = Template(placeholder)
    places = Numbered(template) if numbered else Plain(template)
    found = marked(shards.find(text), places)
    table = places.table if isinstance(places, Numbered) else {}
    return Redacted(found.redacted, found.spans, found.placeholders, table)


def marked(passage: Passage, places: Placeholders) -> Marked:
    """The passage with placeholders for its spans, and for text that would be taken for one."""
    text, spans = passage.text, passage.spans
    clashes = [
        one
        for one in places.lookalikes(text)
        if not any(one.start < span.end and span.start < one.end for span in spans)
    ]
    every = tuple(sorted((*spans, *clashes), key=lambda span: span.start))
    return Marked(passage, every, tuple(places.of(one, text[one.start : one.end]) for one in every))


def _noted(batch: Iterable[Piece], parted: bool) -> Iterator[tuple[Piece, bool]]:
    """Each piece, and whether it is a whole unit; `parted`: the one before was not its unit's
    last."""
    for piece in batch:
        yield piece, piece.ends and not parted
        parted = not piece.ends


def _settled(found: Passage, done: int) -> int:
    """Where a piece of a longer unit can end: MARGIN before its end, at white space, in no span;
    its very end when there is no such place behind `done`."""
    text, latest = found.text, len(found.text) - MARGIN
    spaces = (place for place in range(latest, done, -1) if text[place - 1].isspace())
    at = next(spaces, latest)
    at = next((span.start for span in found.spans if span.start < at < span.end), at)
    return at if at > done else len(text)


def _part(found: Passage, first: int, last: int, at: int) -> Passage:
    """Characters `first` to `last` of what was found; what reaches in from before begins there."""

    def inside(one: Token | Span) -> bool:
        return first < one.end <= last

    tokens = (
        Token(max(0, one.start - first), one.end - first, one.label)
        for one in found.tokens
        if inside(one)
    )
    spans = (
        Span(max(0, one.start - first), one.end - first, one.label, one.score)
        for one in found.spans
        if inside(one)
    )
    return Passage(found.text[first:last], at, tuple(tokens), tuple(spans))


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is half of one"
        raise UserError("the text is not Unicode", found, "give UTF-8 text") from None
