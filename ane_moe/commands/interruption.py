"""Ctrl-C in a command that goes on where it stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


@contextmanager
def ended_by_interrupt(said: str) -> Iterator[None]:
    """Within, Ctrl-C ends the command with this line on stderr."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(said, err=True)
        raise typer.Exit(INTERRUPTED) from None
