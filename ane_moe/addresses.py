"""Places that fsspec knows by an address: `s3://bucket/model`, `https://host/model`."""

import re
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError

# pathlib makes one stroke of two.
ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*?)/*")
HUB = "hf"  # by its own name and cache (checkpoints/hub.py)
# Protocols that need a package beyond fsspec have theirs in this extra.
EXTRA = "pip install 'ane-moe[remote]', or what fsspec names for it"
LONGEST = 200  # characters of an answer that are shown


def address(given: str | Path) -> str | None:
    """The address that is named; None for a path that is there, and for what is none."""
    found = ADDRESS.fullmatch(str(given))
    if found is None or found["protocol"] in (HUB, "file") or Path(given).exists():
        return None
    return f"{found['protocol']}://{found['rest']}"


def named(given: str | Path) -> str:
    """A path or an address, for people."""
    return address(given) or str(given)


def from_anywhere(given: Path) -> Path:
    """What processes in other folders find, too."""
    return given if address(given) else given.absolute()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises UserError where none is
    known or a package is missing."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        return files, path
    except ImportError as error:
        raise UserError(f"{url} needs another package", str(error), EXTRA) from None
    except ValueError as error:
        raise UserError(f"{url} is at no known kind of place", str(error)) from None


def reason_of(error: Exception) -> str:
    """What a library says of it, in a line."""
    return str(error).strip().split("\n")[0][:LONGEST] or type(error).__name__


def unreadable(url: str, error: Exception) -> UserError:
    do = "check the address, and the network"
    return UserError(f"{url} cannot be read", reason_of(error), do)
