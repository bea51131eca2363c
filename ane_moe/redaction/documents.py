"""Documents: bytes of UTF-8 as texts to look at one by one, and back, byte for byte."""

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ane_moe.errors import UserError

CHUNK = 1 << 20  # bytes read at once, at most
LONGEST_PIECE = 1 << 15  # characters of a unit that are looked at together
MOST_PIECES = 512  # that are given out together
NUL_SHARE = 0.1  # UTF-16, and most of what is no text, has more of them; UTF-8 text hardly any

# A unit ends behind a line break, or behind the first blank line after a paragraph.
ENDS = {"line": re.compile(r"\n"), "paragraph": re.compile(r"\n[^\S\n]*\n")}


@dataclass(frozen=True)
class Piece:
    """Some of a text; `ends` says that its unit does, and another one begins."""

    text: str
    ends: bool


def decoded(stream: BinaryIO, name: str) -> Iterator[str]:
    """The characters of a buffered stream, as they come, no line break changed.

    Raises UserError for what is no UTF-8 text, by its place, never by its content.
    """
    decoder, count = codecs.getincrementaldecoder("utf-8")(), 0
    while chunk := stream.read1(CHUNK):  # type: ignore[attr-defined]
        if chunk.count(b"\0") > NUL_SHARE * len(chunk):
            raise UserError(f"{name} is binary, or UTF-16", "many NUL bytes", "give UTF-8 text")
        yield _decode(decoder, chunk, name, count)
        count += len(chunk)
    yield _decode(decoder, b"", name, count)


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, name: str, before: int) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        at = before - waiting + error.start
        kind = "binary" if b"\0" in chunk else "not UTF-8"
        raise UserError(f"{name} is {kind}", f"byte {at} begins no character") from None


def pieces(characters: Iterable[str], unit: str) -> Iterator[list[Piece]]:
    """The text in units (`line` or `paragraph`), the long ones in pieces of LONGEST_PIECE; together
    those that end in what came at once."""
    ends, held = ENDS[unit], ""
    for some in characters:
        held += some
        last, batch = 0, list[Piece]()
        for end in ends.finditer(held):
            batch += _cut(held[last : end.end()])
            last = end.end()
            if len(batch) >= MOST_PIECES:
                yield batch
                batch = []
        held = held[last:]
        while len(held) > 2 * LONGEST_PIECE:
            batch.append(Piece(held[:LONGEST_PIECE], False))
            held = held[LONGEST_PIECE:]
        if batch:
            yield batch
    if held:
        yield [*_cut(held)]


def _cut(unit: str) -> Iterator[Piece]:
    for first in range(0, len(unit), LONGEST_PIECE):
        last = first + LONGEST_PIECE
        yield Piece(unit[first:last], last >= len(unit))


def beside(path: Path, word: str, suffix: str = "") -> Path:
    """The path beside `path` for what is made of it: `notes.redacted.txt` for `notes.txt`, and
    `notes.txt.redacted.html` for what is of another kind."""
    name = f"{path.name}.{word}{suffix}" if suffix else f"{path.stem}.{word}{path.suffix}"
    return path.with_name(name)
