"""How messages count and list names."""

from collections.abc import Iterable

SHOWN = 3  # names a message lists before it only counts


def listed(names: Iterable[str]) -> str:
    """Up to a few of `names`, and how many more there are."""
    ordered = sorted(names)
    shown = ordered[:SHOWN]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `3 tensors`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
