"""Where files are from that were fetched: people know them by that, and not by the folder that this
process has them in."""

import re
from pathlib import Path

_origins: dict[str, str] = {}  # by folder, for the length of this process


def note_origin(folder: Path, origin: str) -> None:
    """From now on `folder`, and what lies in it, is called by its `origin`: an address, or
    hf://OWNER/NAME@COMMIT."""
    for spelling in (folder, folder.absolute(), folder.resolve()):
        _origins[str(spelling)] = origin


def origin_of(folder: Path) -> str | None:
    """Where a folder was fetched from by this process; None for others."""
    return _origins.get(str(folder.absolute()))


def shown(path: Path) -> str:
    """A path by what people know it by."""
    return with_origins(str(path))


def with_origins(text: str) -> str:
    """A text that calls what was fetched by where it is from."""
    origins = dict(_origins)  # others may add to it
    if not any(folder in text for folder in origins):
        return text
    # Whole, since a relative folder is the end of its own absolute spelling, and what lies within
    # others first.
    spellings = "|".join(map(re.escape, sorted(origins, key=len, reverse=True)))
    return re.sub(rf"(?<![\w./-])(?:{spellings})(?![\w-])", lambda at: origins[at[0]], text)
