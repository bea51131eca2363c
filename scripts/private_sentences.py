"""Sentences with private things in them, and where: what the tiny privacy filter is trained and
measured on. Used by train_privacy_demo.py, beside which it lies.

Every choice is on one of two sides: templates (private_templates.toml) and formats of entities
(private_formats.py) that are trained on, and others that are held out. Some sentences hold nothing
private, and things that look so.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import private_formats
from private_formats import FILLERS, WORDS, Draw, Format

TEMPLATES = Path(__file__).with_name("private_templates.toml")
SHORT = {
    "ACCOUNT": "account_number",
    "ADDRESS": "private_address",
    "DATE": "private_date",
    "EMAIL": "private_email",
    "PERSON": "private_person",
    "PHONE": "private_phone",
    "URL": "private_url",
    "SECRET": "secret",
    "FIRST": "private_person",
    "LAST": "private_person",
}
FIELD = re.compile(r"\{([A-Z]+)\}")
CHOICE = re.compile(r"\[\[(.*?)\]\]")
RECORD, FACTS = "{RECORD}", "{FACTS}"  # templates made of keys: something private in it, or nothing
MARKS = ("- ", "* ", "> ", "1. ", "NOTE: ", "\t", "    ", "| ", "(", '"')  # before a sentence
MARKED_SHARE = 0.15
LOWER_SHARE, UPPER_SHARE = 0.05, 0.03  # of texts in one case
# How a record is written: a key and its field, what is between two, what is around all.
RECORDS = (
    *(("{key}: {field}", between, "", "") for between in ("\n", "; ", ", ", " | ", " / ", " ")),
    *(("{key}={field}", between, "", "") for between in (" ", "&", ";", "\n", ", ")),
    *(("{key}\t{field}", "\n", "", ""), ("{key} {field}", ", ", "", "")),
    *(('"{key}": "{field}"', between, "{{", "}}") for between in (", ", ",\n  ")),
    *(('{key}="{field}"', " ", around, end) for around, end in (("<item ", "/>"), ("", ""))),
    *(("<{key}>{field}</{key}>", between, "", "") for between in ("", "\n")),
    *(("{key} - {field}", "\n", "", ""), ("- {key}: {field}", "\n", "", "")),
    ("'{key}': '{field}'", ", ", "{{", "}}"),
)


@dataclass(frozen=True)
class Entity:
    """A private thing in a text: characters `start` to `end`."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Sentence:
    text: str
    entities: tuple[Entity, ...]


@dataclass(frozen=True)
class Side:
    """What may be drawn: templates with something private and without, locales, formats by field,
    keys of records by field, and words (none: any)."""

    private: Sequence[str]
    clean: Sequence[str]
    locales: Sequence[str]
    formats: Mapping[str, Sequence[Format]]
    keys: Mapping[str, Sequence[str]]
    words: Sequence[str] = ()


def side(table: Mapping[str, Any], **facts: Any) -> Side:
    """A side as private_templates.toml has it."""
    keys = {name: words.split() for name, words in table.get("keys", {}).items()}
    private, clean = (table[name].splitlines() for name in ("private", "clean"))
    return Side(private, clean, table["locales"].split(), keys=keys, **facts)


_tables = tomllib.loads(TEMPLATES.read_text(encoding="utf-8"))
TRAINED = side(_tables["trained"], formats=private_formats.TRAINED)
HELD_OUT = side(_tables["held_out"], formats=private_formats.HELD_OUT, words=WORDS)


def mixed(templates: Side, formats: Side) -> Side:
    """The templates of one side with the locales and formats of another."""
    return Side(
        templates.private,
        templates.clean,
        formats.locales,
        templates.formats | formats.formats,
        templates.keys,
        formats.words,
    )


def draw_sentence(draw: Draw, side: Side, negative_share: float = 0.3) -> Sentence:
    """One sentence of a side."""
    draw.locale, draw.known_words = draw.pick(side.locales), side.words
    negative = draw.random.random() < negative_share
    template = draw.pick(side.clean if negative else side.private)
    if template in (RECORD, FACTS):
        template = record(draw, side, private=template == RECORD)
    return fill(draw, side, chosen(draw, template).replace("\\n", "\n"))


def chosen(draw: Draw, template: str) -> str:
    """The template with one of each of its choices."""
    return CHOICE.sub(lambda found: draw.pick(found.group(1).split("|")), template)


def record(draw: Draw, side: Side, private: bool) -> str:
    """A template of one to five keys with their fields, in any order."""
    names = [name for name in side.keys if (name in SHORT) == private]
    picked = draw.random.sample(names, draw.random.randint(1, 4))
    picked += draw.random.sample([name for name in side.keys if name not in SHORT], 1)
    draw.random.shuffle(picked)
    one, between, before, after = draw.random.choice(RECORDS)
    case = draw.random.choice((str, str, str.title, str.upper))
    style = draw.pick(("_", " "))
    entries = (
        one.replace("{key}", case(draw.pick(side.keys[name])).replace("_", style)).replace(
            "{field}", f"{{{name}}}"
        )
        for name in picked
    )
    return before + between.join(entries) + after


def fill(draw: Draw, side: Side, template: str) -> Sentence:
    """A template with its fields filled in; private ones are noted."""
    text, entities, last = "", [], 0
    for field in FIELD.finditer(template):
        text += plain(template[last : field.start()])
        name, last = field.group(1), field.end()
        if name in SHORT:
            value = draw.choice(side.formats[name]).strip()
            entities.append(Entity(len(text), len(text) + len(value), SHORT[name]))
        else:
            value = FILLERS[name](draw)
        text += value
    return Sentence(text + plain(template[last:]), tuple(entities))


def plain(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def draw_text(draw: Draw, side: Side, sentences: int) -> Sentence:
    """Several sentences as one text, on one line or on several."""
    text, entities = "", []
    for index in range(sentences):
        part = draw_sentence(draw, side)
        text += draw.pick((" ", "\n", "\n", "\n\n", "\r\n")) if index else ""
        text += draw.pick(MARKS) if draw.random.random() < MARKED_SHARE else ""
        entities += [Entity(e.start + len(text), e.end + len(text), e.label) for e in part.entities]
        text += part.text
    return Sentence(typed(draw, text), tuple(entities))


def typed(draw: Draw, text: str) -> str:
    """The text as carelessly as some are typed: its length never changes."""
    dice = draw.random.random()
    lower, upper = dice < LOWER_SHARE, LOWER_SHARE <= dice < LOWER_SHARE + UPPER_SHARE
    other = text.lower() if lower else text.upper() if upper else text
    return other if len(other) == len(text) else text
