"""Windows: how a text longer than the model's functions take goes through them.

A token's scores depend on tokens up to `context` away, on either side: each layer looks as far as
its band, at tokens that have looked as far before, so band times depth. A window's token has the
scores of the whole text when it lies that far from both ends of the window, or where those are the
text's own ends. So windows keep their middles, and the middles join without a gap.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ane_moe.loop.windows import Window


class Scorer(Protocol):
    """What gives scores to the tokens of one window (loop/labels.py is one)."""

    @property
    def labels(self) -> Sequence[str]:
        """The names of the scores, in their order."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """The numbers of tokens that there are functions for."""
        ...

    @property
    def context_each_side(self) -> int:
        """How far away a token can matter to another's scores."""
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores `[N, labels]`, float32, of 1 to max(lengths) tokens."""
        ...

    def packed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The scores of several texts that fit into one window, one behind the other: those that
        each has alone."""
        ...


LEAST_KEPT = 8  # a window keeps at least this part of it, or long texts cost too much


def context_within(length: int, context: int) -> int:
    """The tokens on each side that windows of `length` give: `context`, or a quarter of the window
    where that would leave next to nothing to keep."""
    return context if length - 2 * context >= max(1, length // LEAST_KEPT) else length // 4


def plan_windows(count: int, length: int, context: int) -> list[Window]:
    """Windows of at most `length` tokens, whose kept parts join to `count` tokens."""
    if count <= length:
        return [Window(0, count, 0, count)] if count else []
    around = context_within(length, context)
    windows, kept = [], 0
    while kept < count:
        first = max(0, min(kept - around, count - length))
        last = first + length
        kept_last = count if last == count else last - around
        windows.append(Window(first, last, kept, kept_last))
        kept = kept_last
    return windows


def is_exact(scorer: Scorer) -> bool:
    """Whether long texts get the scores that they would get in one piece."""
    context = scorer.context_each_side
    return context_within(max(scorer.lengths), context) == context


def scores_of(scorer: Scorer, ids: Sequence[int]) -> np.ndarray:
    """Scores `[N, labels]`, float32, of a text's tokens, however many they are."""
    scores = np.empty((len(ids), len(scorer.labels)), np.float32)
    for window in plan_windows(len(ids), max(scorer.lengths), scorer.context_each_side):
        found = scorer.logits(ids[window.first : window.last])
        kept = slice(window.kept_first - window.first, window.kept_last - window.first)
        scores[window.kept_first : window.kept_last] = found[kept]
    return scores


def scores_of_all(scorer: Scorer, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """`scores_of` each text, those that are short together in as few windows as their order
    allows.

    Such a window is of the shortest length that spans the model's context: longer ones spend more
    on attention that the band hides than they save in calls.
    """
    longest, context = max(scorer.lengths), scorer.context_each_side
    shared = min((one for one in scorer.lengths if one >= context), default=longest)
    waiting, room = list[Sequence[int]](), 0
    for ids in texts:
        if len(ids) > room:
            yield from _together(scorer, waiting)
            waiting, room = [], shared
        if len(ids) > shared:
            yield scores_of(scorer, ids)
            room = 0
        else:
            waiting.append(ids)
            room -= len(ids)
    yield from _together(scorer, waiting)


def _together(scorer: Scorer, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    ends = np.cumsum([len(ids) for ids in texts], dtype=np.intp)
    if not texts:
        return
    there = ends[-1] > 0
    scores = scorer.packed([ids for ids in texts if len(ids)]) if there else scores_of(scorer, ())
    yield from np.split(scores, ends[:-1])
