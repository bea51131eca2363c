"""Lists of numbers as people type them: layers `0-3,5`, token counts `1,16,64`."""

import re

from ane_moe.errors import UserError

MAX_COUNT = 10_000_000


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of a list such as `0-3` or `0,5,7-8`. Raises UserError when it is none."""
    numbers: set[int] = set()
    for piece in text.split(","):
        span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", piece.strip())
        if span is None:
            example = "write for instance 0-3 or 0,5,7-8"
            raise UserError("--layers takes a list of layers", repr(text), example)
        numbers |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
    return tuple(sorted(numbers))


def parse_counts(text: str, option: str, least: int, most: int = MAX_COUNT) -> tuple[int, ...]:
    """Rising token counts of a list such as `1,16,64`, each once. Raises UserError when it is none,
    or when one of them is not from `least` to `most`."""
    if re.fullmatch(r" *\d{1,8}( *, *\d{1,8})* *", text) is None:
        example = f"write for instance {least},512"
        raise UserError(f"{option} takes a list of token counts", repr(text), example)
    counts = tuple(sorted({int(piece) for piece in text.split(",")}))
    if not least <= counts[0] <= counts[-1] <= most:
        shown = ",".join(map(str, counts))
        raise UserError(f"{option} takes token counts from {least} to {most}", shown)
    return counts
