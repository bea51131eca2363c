"""What `redact` and `unredact` read and write: a text, standard input, files; standard output, or a
file beside each."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import typer

from ane_moe.errors import UserError
from ane_moe.files import named_by_user
from ane_moe.redaction.documents import decoded


@dataclass(frozen=True)
class Source:
    """A text of the command line, a file, or (neither) standard input."""

    text: str | None = None
    path: Path | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "stdin" if self.text is None else "text"

    @property
    def size(self) -> int:
        """Bytes, 0 where nobody knows."""
        return self.path.stat().st_size if self.path and self.path.is_file() else 0

    def characters(self) -> Iterator[str]:
        """The text as it comes. Raises UserError."""
        if self.text is not None:
            yield self.text
        elif self.path is None:
            yield from decoded(typer.get_binary_stream("stdin"), self.name)
        else:
            with _opened(self.path) as stream:
                yield from decoded(stream, self.name)


def sources(file: Path | None, rest: list[str] | None) -> list[Source]:
    """What the arguments name: `--file` and what follows, or one text, or standard input."""
    given = rest or []
    if file is not None:
        return [Source(path=path) for path in (file, *map(Path, given))]
    if len(given) > 1:
        raise UserError(
            "more than one text is given",
            f"{len(given)} arguments",
            "quote the text, or put --file before names of files",
        )
    if given:
        return [Source(text=given[0])]
    if sys.stdin.isatty():
        raise UserError("there is no text", "", "give TEXT or --file, or pipe it in")
    return [Source()]


def write_out(chunks: Iterable[str]) -> None:
    """Write to standard output as UTF-8, whatever the terminal's encoding, byte for byte."""
    out = typer.get_binary_stream("stdout")
    for chunk in chunks:
        out.write(chunk.encode())
        out.flush()  # of a log that is followed, lines are wanted as they come


def write_beside(path: Path, chunks: Iterable[str]) -> None:
    """Write a file, whole or not at all. Raises UserError."""
    with named_by_user(path) as temporary, temporary.open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk.encode())


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error.strerror)) from None
    with stream:
        yield stream
