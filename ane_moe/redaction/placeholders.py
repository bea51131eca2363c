"""Placeholders: what stands in a redacted text where something private was, and the way back.

Numbered placeholders are exact to undo, whatever the text holds. A placeholder begins and ends
with marks that are nowhere else in it, so two of them never overlap, nor does one begin in the text
around another. A text that holds what looks like one keeps it, and its number is not given out;
where the number had been given out before, what looks so is replaced like a span.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.files import named_by_user
from ane_moe.redaction.spans import Span, short_label

FIELD = "{LABEL}"
DEFAULT = f"[{FIELD}]"
LOOKALIKE = "placeholder"  # the label of text that looks like a placeholder
LONGEST_NAME = 64  # characters of a placeholder that are the label's, at most
LONGEST_FIXED = 64  # and those that are the template's, beside its marks
LONGEST = 2 + LONGEST_FIXED + LONGEST_NAME + 1 + 16  # with its number
MAPPING_FORMAT = 1


@dataclass(frozen=True)
class Template:
    """How a placeholder is written: `{LABEL}` stands for the label in capitals."""

    text: str = DEFAULT

    def of(self, label: str, number: int | None = None) -> str:
        """`[EMAIL]` or `[EMAIL_1]`."""
        name = re.sub(r"\W+", "_", short_label(label).upper())[:LONGEST_NAME]
        return self.text.replace(FIELD, name if number is None else f"{name}_{number}")

    @property
    def lookalikes(self) -> re.Pattern[str]:
        """What could be a numbered placeholder.

        Raises UserError unless the template can be undone.
        """
        before, field, after = self.text.partition(FIELD)
        marks, fixed = self.text[:1] + self.text[-1:], before[1:] + after[:-1]
        faults = (
            not (before and field and after),
            marks[:1] == marks[1:],
            re.search(r"[\w\s]", marks),
            re.search(rf"[\s{re.escape(marks)}]", fixed),
            len(fixed) > LONGEST_FIXED,
        )
        if any(faults):
            raise UserError(
                "numbered placeholders need a template that can be undone",
                self.text,
                "write {LABEL} between two different marks that are nowhere else in it, without "
                "white space, as [{LABEL}]",
            )
        name = rf"\w{{1,{LONGEST_NAME}}}_[1-9][0-9]{{0,15}}"
        return re.compile(re.escape(before) + name + re.escape(after))

    def begun_in(self, text: str) -> str:
        """The end of `text` from a first mark on that has no last one yet."""
        at = text.rfind(self.text[0], max(0, len(text) - LONGEST))
        return "" if at < 0 or self.text[-1] in text[at:] else text[at:]


class Plain:
    """Every span of a kind gets the same placeholder."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def lookalikes(self, _text: str) -> list[Span]:
        return []

    def of(self, span: Span, _text: str) -> str:
        return self._template.of(span.label)


class Numbered:
    """The same text gets the same placeholder, another text another one."""

    def __init__(self, template: Template) -> None:
        """Raises UserError unless the template can be undone."""
        self.template = template
        self.table: dict[str, str] = {}  # text by placeholder
        self._pattern = template.lookalikes
        self._given: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        self._kept: set[str] = set()  # lookalikes that were left in the text
        self._begun = ""  # the end of the text so far, where it could begin a lookalike

    def lookalikes(self, text: str) -> list[Span]:
        """Where the text, which goes on from the one before, holds what is a placeholder of other
        text by now; other lookalikes may stay, and are remembered. To be asked before placeholders
        for the text are."""
        clashes, before = [], len(self._begun)
        joined = self._begun + text
        for found in self._pattern.finditer(joined):
            if found.group() in self.table:
                start = max(0, found.start() - before)
                clashes.append(Span(start, found.end() - before, LOOKALIKE, 1.0))
            else:
                self._kept.add(found.group())
        self._begun = self.template.begun_in(joined)
        return clashes

    def of(self, span: Span, text: str) -> str:
        """The placeholder of a span that covers `text`."""
        kind = self.template.of(span.label)
        key = (kind, text)
        if key not in self._given:
            self._given[key] = self._next(kind, span.label)
            self.table[self._given[key]] = text
        return self._given[key]

    def _next(self, kind: str, label: str) -> str:
        while True:
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            placeholder = self.template.of(label, self._numbers[kind])
            if placeholder not in self._kept:
                return placeholder


Placeholders = Plain | Numbered


@dataclass(frozen=True)
class Mapping:
    """The way back from placeholders to text."""

    template: Template
    table: dict[str, str]


def write_mapping(path: Path, numbered: Numbered) -> None:
    """Write the table for its owner alone to read (mode 0600). Raises UserError."""
    document = {
        "format": MAPPING_FORMAT,
        "placeholder": numbered.template.text,
        "table": numbered.table,
    }
    with named_by_user(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump(document, stream, ensure_ascii=False, indent=1)
            stream.write("\n")


def read_mapping(path: Path) -> Mapping:
    """Read what `write_mapping` wrote. Raises UserError, which says nothing of the content."""
    try:
        return _mapping(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error.strerror)) from None
    except (ValueError, KeyError, TypeError, UserError):
        do = "give the file that redact --mapping wrote"
        raise UserError(f"{path} is no mapping", do=do) from None


def _mapping(document: Any) -> Mapping:
    """Raises KeyError, TypeError, ValueError or UserError for what is no mapping."""
    text, table = document["placeholder"], document["table"]
    if document["format"] != MAPPING_FORMAT or not isinstance(text, str):
        raise ValueError
    pattern = Template(text).lookalikes
    if not all(pattern.fullmatch(key) and isinstance(table[key], str) for key in table):
        raise ValueError
    return Mapping(Template(text), table)


def restored(text: str, mapping: Mapping) -> str:
    """`text` with every placeholder of the mapping replaced by what it stood for."""
    return mapping.template.lookalikes.sub(
        lambda found: mapping.table.get(found.group(), found.group()), text
    )


def restored_stream(pieces: Iterable[str], mapping: Mapping) -> Iterator[str]:
    """`restored` for a text that comes in pieces, which may part a placeholder."""
    begun = ""
    for piece in pieces:
        text = begun + piece
        begun = mapping.template.begun_in(text)
        yield restored(text[: len(text) - len(begun)], mapping)
    yield begun
