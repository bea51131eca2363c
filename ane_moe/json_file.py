"""Reads JSON objects from files that are not trusted."""

import json
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.lfs import FETCH, is_lfs_pointer

MAX_JSON_BYTES = 64_000_000
# Numbers that JSON has no form for, as transformers spells them: {"__float__": "Infinity"}.
FLOAT, FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a UTF-8 file, with a byte order mark or without, of at most 64 MB.

    Raises UserError when it cannot be read, stands for a file of Git LFS, or is no JSON object.
    """
    if is_lfs_pointer(path):
        raise UserError(f"{path} is not JSON", "a pointer of Git LFS", FETCH)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is too large", f"{path.stat().st_size} bytes")
        data = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_plain)
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", str(error)) from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object", type(data).__name__)
    return data


def _plain(values: dict[str, Any]) -> Any:
    spelt = values.get(FLOAT) if len(values) == 1 else None
    return float(spelt) if spelt in FLOATS else values
