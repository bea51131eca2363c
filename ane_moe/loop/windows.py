"""Windows over sequences that an encoder cannot take in whole."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens from `first` up to `last` go through a function; those from `kept_first` up to
    `kept_last` have everything that they depend on among them."""

    first: int
    last: int
    kept_first: int
    kept_last: int


def windows_of(spans: Iterable[slice], tokens: int, reach: int) -> Iterator[Window]:
    """Windows of at most `tokens` tokens over each span, so that every token is kept once, if a
    token depends on `reach` tokens on either side of it.

    A window begins `reach` tokens before the first that it keeps, and keeps all but the last
    `reach`, unless the span ends there. A longer span than `tokens` is left after its first window
    where `tokens` is not more than `2 * reach`: nothing more would be kept.
    """
    for span in spans:
        first, kept = span.start, span.start
        while kept < span.stop:
            last = min(first + tokens, span.stop)
            end = span.stop if last == span.stop else last - reach
            if end <= kept:
                break
            yield Window(first, last, kept, end)
            first, kept = max(span.start, end - reach), end
