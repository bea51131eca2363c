"""What others published of Core AI (`core_ai.toml`): figures of their own, which no forecast is
made of."""

import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PUBLISHED = Path(__file__).with_name("core_ai.toml")


@dataclass(frozen=True)
class Speed:
    """A whole model's, in tokens a second; `engine` is gpu or ane, as its source says."""

    model: str
    weights: str
    engine: str
    chip: str
    decode_tok_s: float
    conditions: str
    source: str
    prefill_tok_s: float | None = None


@dataclass(frozen=True)
class BesideCoreMl:
    """Core ML's speed with the same codes, as a share of Core AI's: least and most."""

    weights: str
    share: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Fault:
    """A result that is wrong, or comes from elsewhere than asked, on a device, with weights of
    these `formats` (patterns)."""

    formats: tuple[str, ...]
    what: str
    instead: str
    source: str

    def concerns(self, form: str) -> bool:
        return any(fnmatchcase(form, pattern) for pattern in self.formats)

    def sentence(self, form: str) -> str:
        """For whoever converts."""
        return f"Core AI, published: {form}: {self.what}; instead: {self.instead} ({self.source})"


@dataclass(frozen=True)
class Published:
    speeds: tuple[Speed, ...]
    beside: tuple[BesideCoreMl, ...]
    faults: tuple[Fault, ...]


@functools.cache
def published() -> Published:
    """All of it."""
    document = tomllib.loads(PUBLISHED.read_text())
    beside = [row | {"share": tuple(row["share"])} for row in document["beside"]]
    faults = [row | {"formats": tuple(row["formats"])} for row in document["fault"]]
    return Published(
        tuple(Speed(**row) for row in document["speed"]),
        tuple(BesideCoreMl(**row) for row in beside),
        tuple(Fault(**row) for row in faults),
    )


def of_conversion(formats: Iterable[str]) -> tuple[str, ...]:
    """What a report says of a conversion for Core AI, in the place of a forecast: sentences."""
    shares = "; ".join(
        f"{row.weights} {row.share[0]:g} to {row.share[1]:g}" for row in published().beside
    )
    return (
        "Nothing tells where Core AI runs a graph, and nothing is forecast of it here.",
        "Published, the same codes on the Neural Engine: Core ML has these shares of Core AI's "
        f"speed: {shares} (cadamcat, M5 Pro).",
        *faults_of(formats),
    )


def faults_of(formats: Iterable[str]) -> list[str]:
    """A sentence for each format that a fault is known of."""
    return [
        fault.sentence(form)
        for form in sorted(set(formats))
        for fault in published().faults
        if fault.concerns(form)
    ]
