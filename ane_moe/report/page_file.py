"""A page on disk: whole or not there."""

import os
from pathlib import Path

from ane_moe.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically. Raises UserError where that is not possible."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written", str(error.strerror), "name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
