"""What is wrong, a line each, and how many lines are not shown."""

from collections.abc import Iterator, Sequence

from rich.text import Text

SHOWN = 20


def failure_lines(lines: Sequence[str]) -> Iterator[Text]:
    """In red, SHOWN of them at most."""
    for line in lines[:SHOWN]:
        yield Text(line, style="red")
    if len(lines) > SHOWN:
        yield Text(f"and {len(lines) - SHOWN} more (--json lists them all)", style="red")
