"""Places that fsspec knows by an address: `s3://bucket/model`, `https://host/model`."""

import re
from pathlib import Path
from typing import Any

from ane_moe.errors import QUERY, USER, UserError, without_secrets

# pathlib makes one stroke of two.
ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*?)/*", re.I)
LIKE_ONE = re.compile(r"(?P<protocol>[a-z][a-z0-9+.:-]+):(?P<rest>/.*)?", re.I)
HUB = "hf"  # by its own name and cache (checkpoints/hub.py)
HERE = re.compile(r"\A(?:file|local):/+(?=[^/])", re.I)
# Protocols that need a package beyond fsspec have theirs in this extra.
EXTRA = "pip install 'ane-moe[remote]', or what fsspec names for it"
LONGEST = 200  # characters of an answer that are shown


def address(given: str | Path) -> str | None:
    """The address that is named; None for a path that is there, and for what is none. Raises
    UserError for one that gives access: addresses are shown, kept, and sent to workers."""
    found = ADDRESS.fullmatch(str(given))
    if found is None or HERE.match(str(given)) or Path(given).exists():
        return None
    protocol = found["protocol"].lower()
    if protocol == HUB:
        return None
    url = f"{protocol}://{found['rest']}"
    if USER.search(url) or (protocol.startswith("http") and QUERY.search(url)):
        raise UserError(
            f"{url} has a password or a query in it",
            do="credentials are fsspec's own: ~/.config/fsspec/conf.json, or the store's",
        )
    return url


def local_path(given: str | Path) -> Path:
    """The path that is given, or that `file://` is before."""
    return Path(given if Path(given).exists() else HERE.sub("/", str(given), count=1))


def output_place(given: Path) -> Path:
    """The path or the address, as it is given, where something is to be written. Raises UserError
    for what looks like an address and is none."""
    path = local_path(given)
    found = LIKE_ONE.fullmatch(str(path))
    if found is None or address(path) or path.exists():
        return path
    shown = f"{found['protocol']}://{(found['rest'] or '').lstrip('/')}"
    if found["protocol"].lower() == HUB:
        raise UserError(
            f"{shown} is on the Hugging Face Hub, where this does not write",
            do="name a folder, then `ane-moe push FOLDER OWNER/NAME`",
        )
    raise UserError(f"{shown} is no address", do="name a folder, or PROTOCOL://PLACE/NAME")


def output_path(given: Path) -> Path:
    """`output_place`, where no address will do."""
    if url := address(given):
        raise UserError(f"{url} is an address", do="name a place on this machine")
    return output_place(given)


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
        raise UserError(f"{url} needs another package", reason_of(error), EXTRA) from None
    except ValueError as error:
        raise UserError(f"{url} is at no known kind of place", reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """What a library says of it, in a line, without what gives access."""
    said = without_secrets(str(error).strip().split("\n")[0])
    return said[:LONGEST] or type(error).__name__


def unreadable(url: str, error: Exception) -> UserError:
    do = "check the address, and the network"
    return UserError(f"{url} cannot be read", reason_of(error), do)
