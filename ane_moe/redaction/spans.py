"""Spans of a text: from labels of tokens to characters of the original."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError
from ane_moe.redaction.viterbi import OUTSIDE

COMMON_PREFIX = "private_"  # of labels, which people leave out

Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text; `score` is the mean probability of its tokens'
    labels, 0 to 1."""

    start: int
    end: int
    label: str
    score: float

    @property
    def short(self) -> str:
        """The label as people write it: `email` for `private_email`."""
        return short_label(self.label)


def short_label(label: str) -> str:
    return label.removeprefix(COMMON_PREFIX)


def kinds_of(labels: Sequence[str]) -> list[str]:
    """The kinds of spans that BIOES labels tell apart, in their order."""
    return list(dict.fromkeys(label[2:] for label in labels if label != OUTSIDE))


def find_kinds(names: Sequence[str], labels: Sequence[str]) -> frozenset[str]:
    """The kinds of spans that `names` name, in full or short. Raises UserError for an unknown
    one."""
    kinds = {name: kind for kind in kinds_of(labels) for name in (kind, short_label(kind))}
    unknown = [name for name in names if name not in kinds]
    if unknown:
        there = ", ".join(map(short_label, kinds_of(labels)))
        raise UserError("unknown label", ", ".join(unknown), f"this model has {there}")
    return frozenset(kinds[name] for name in names)


def probabilities(scores: np.ndarray, path: np.ndarray) -> np.ndarray:
    """The softmax probability `[N]` of each token's label in `path`, of scores `[N, L]`."""
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted[np.arange(len(path)), path] / shifted.sum(axis=1)


def token_spans(names: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """First token, last + 1 and kind of each span of legal BIOES labels."""
    first = 0
    for token, name in enumerate(names):
        if name[0] in "BS":
            first = token
        if name[0] in "ES":
            yield first, token + 1, name[2:]


def spans_of(
    text: str, offsets: Offsets, names: Sequence[str], certain: np.ndarray
) -> tuple[Span, ...]:
    """The spans of legal BIOES labels: `names` `[N]` of tokens at `offsets` `[N]` of `text`, with
    the labels' probabilities.

    White space at a span's ends is left out of it: tokens begin with the space before a word. A
    character that tokens of two spans share belongs to the first.
    """
    found: list[Span] = []
    for first, last, label in token_spans(names):
        covered = [pair for pair in offsets[first:last] if pair[0] < pair[1]]
        start = min((pair[0] for pair in covered), default=0)
        end = max((pair[1] for pair in covered), default=0)
        start = max(start, found[-1].end if found else 0)
        inside = text[start:end]
        start += len(inside) - len(inside.lstrip())
        end = start + len(inside.strip())
        if start < end:
            found.append(Span(start, end, label, float(certain[first:last].mean())))
    return tuple(found)


def as_bio(names: Sequence[str]) -> list[str]:
    """BIOES labels as plain BIO: a span begins with B and goes on with I."""
    plain = {"S": "B", "E": "I"}
    return [plain.get(name[0], name[0]) + name[1:] for name in names]
