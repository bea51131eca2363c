"""The forms in which redacted documents are given out: each makes strings of marked passages, as
they come, so that a document may be longer than memory."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from rich.text import Text

from ane_moe.mlprogram.printer import printable
from ane_moe.redaction.redactor import Marked
from ane_moe.redaction.spans import Span, as_bio, short_label

SPOOLED_BYTES = 1 << 20  # of a redacted text, in memory; more goes to a temporary file

# Of each kind of span, in the model's order: the style in a terminal, the hue on a page.
COLOURS = (
    ("black on yellow", 50),
    ("black on cyan", 190),
    ("black on green", 120),
    ("white on blue", 220),
    ("white on magenta", 300),
    ("black on bright_red", 10),
    ("black on bright_cyan", 170),
    ("white on red", 340),
)


def text_form(passages: Iterable[Marked]) -> Iterator[str]:
    """The redacted text."""
    return (one.redacted for one in passages)


def span_form(passages: Iterable[Marked]) -> Iterator[str]:
    """A JSON object a line for every span."""
    for one in passages:
        for row in _rows(one):
            yield json.dumps(row, ensure_ascii=False) + "\n"


def json_form(passages: Iterable[Marked], source: str | None) -> Iterator[str]:
    """One JSON document on one line: spans, their counts by label, and the redacted text."""
    counts: Counter[str] = Counter()
    yield f'{{"source": {json.dumps(source)}, "spans": ['
    with tempfile.SpooledTemporaryFile(SPOOLED_BYTES, "w+", encoding="utf-8", newline="") as text:
        for one in passages:
            text.write(one.redacted)
            for row in _rows(one):
                yield (", " if counts else "") + json.dumps(row, ensure_ascii=False)
                counts[row["label"]] += 1
        yield f'], "counts": {json.dumps(counts, sort_keys=True)}, "text": "'
        text.seek(0)
        while some := text.read(SPOOLED_BYTES):
            yield json.dumps(some, ensure_ascii=False)[1:-1]
    yield '"}\n'


def token_form(passages: Iterable[Marked], scheme: str) -> Iterator[str]:
    """A line for every token: its first and last + 1 character, its label, its text as JSON."""
    for one in passages:
        text, at, tokens = one.passage.text, one.passage.at, one.passage.tokens
        labels = [token.label for token in tokens]
        names = as_bio(labels) if scheme == "bio" else labels
        for token, name in zip(tokens, names, strict=True):
            said = json.dumps(text[token.start : token.end], ensure_ascii=False)
            yield f"{at + token.start}\t{at + token.end}\t{name}\t{said}\n"


def check_form(passages: Iterable[Marked], source: str) -> Iterator[str]:
    """A line for every span: where it begins, as compilers write it, its label and score; none of
    the text."""
    line, column = 1, 1
    for one in passages:
        text, last = one.passage.text, 0
        for span in one.passage.spans:
            line, column = _after(text[last : span.start], line, column)
            last = span.start
            yield f"{printable(source)}:{line}:{column}: {span.short} ({span.score:.0%})\n"
        line, column = _after(text[last:], line, column)


def view_form(passages: Iterable[Marked], labels: Sequence[str]) -> Iterator[Text]:
    """The original text for a terminal, spans in colour with label and score behind each."""
    for one in passages:
        view, last, text = Text(), 0, one.passage.text
        for span in one.spans:
            view.append(_shown(text[last : span.start]))
            view.append(_shown(text[span.start : span.end]), style=_colour(span, labels)[0])
            view.append(f" {span.short} {span.score:.0%}", style="dim")
            last = span.end
        yield view.append(_shown(text[last:]))


def html_form(
    passages: Iterable[Marked], labels: Sequence[str], source: str | None
) -> Iterator[str]:
    """The original text as one page, spans in colour with label and score, their counts below. No
    network, no scripts."""
    yield PAGE.replace("TITLE", escape(f"private in {source}" if source else "private in a text"))
    counts: Counter[str] = Counter()
    for one in passages:
        text, last = one.passage.text, 0
        for span in one.spans:
            counts[span.short] += 1
            yield _visible(text[last : span.start]) + _mark(text, span, labels)
            last = span.end
        yield _visible(text[last:])
    listed = ", ".join(f"{escape(label)} {count}" for label, count in sorted(counts.items()))
    yield f"</pre><p>{listed or 'nothing found'}</p></main></body></html>\n"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
       padding: 0 1rem; color: #222; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; unicode-bidi: plaintext }
mark { border-radius: .2em; padding: .05em .15em; color: inherit; unicode-bidi: isolate }
mark small { opacity: .65; padding-left: .3em; user-select: none }
</style></head><body><main><h1>TITLE</h1>
<p>This page shows the original text: keep it as you keep that.</p><pre>"""


def _rows(one: Marked) -> Iterator[dict[str, Any]]:
    at = one.passage.at
    for span, placeholder in zip(one.spans, one.placeholders, strict=True):
        yield {
            "start": at + span.start,
            "end": at + span.end,
            "label": span.label,
            "score": round(span.score, 4),
            "placeholder": placeholder,
        }


def _after(text: str, line: int, column: int) -> tuple[int, int]:
    """The place behind `text` that begins at a place."""
    breaks = text.count("\n")
    return line + breaks, (len(text) - text.rfind("\n") if breaks else column + len(text))


def _colour(span: Span, labels: Sequence[str]) -> tuple[str, int]:
    place = labels.index(span.label) if span.label in labels else len(COLOURS) - 1
    return COLOURS[place % len(COLOURS)]


def _shown(text: str) -> str:
    """For a terminal, which the text must not drive; line breaks and tabs stay."""
    return "".join(one if one in "\n\t" else printable(one) for one in text.replace("\r\n", "\n"))


def _mark(text: str, span: Span, labels: Sequence[str]) -> str:
    hue = _colour(span, labels)[1]
    said = f"<small>{escape(short_label(span.label))} {span.score:.0%}</small>"
    shown = _visible(text[span.start : span.end])
    return f'<mark style="background: hsl({hue} 85% 82%)">{shown}{said}</mark>'


def _visible(text: str) -> str:
    """For a page, which can show no control characters: their pictures stand for them."""
    pictures = {place: chr(0x2400 + place) for place in range(32) if chr(place) not in "\n\t\r"}
    return escape(text.translate(pictures))
