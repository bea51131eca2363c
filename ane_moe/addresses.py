"""Places that fsspec knows by an address: `s3://bucket/model`, `https://host/model`."""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ane_moe.errors import QUERY, USER, UserError, without_secrets

T = TypeVar("T")
# pathlib makes one stroke of two.
ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>[^/].*?)/*", re.I)
LIKE_ONE = re.compile(r"(?P<protocol>[a-z][a-z0-9+.:-]+):(?P<rest>/.*)?", re.I)
ADDRESS_FILE = ".address"  # in a folder of our cache, and nowhere else: which address it is of
HUB = "hf"  # by its own name and cache (checkpoints/hub.py)
ON_HUB = re.compile(rf"\A{HUB}:/{{1,2}}(?=[^/])", re.I)
AT_COMMIT = re.compile(rf"{HUB}://(?P<hub>[^/]+/[^/@]+)@(?P<revision>[^/]+)(?:/(?P<file>.+))?")
HERE = re.compile(r"\A(?:file|local):/+(?=[^/])", re.I)
# Protocols that need a package beyond fsspec have theirs in this extra.
EXTRA = "pip install 'ane-moe[remote]', or what fsspec names for it"
LONGEST = 200  # characters of an answer that are shown
MAX_SMALL_BYTES = 1 << 28  # of a file that is read whole
TRIES, PAUSE_SECONDS = 5, 0.5  # again, where the line breaks; twice the pause each time
FINAL = (FileNotFoundError, PermissionError, UserError)  # another try gives the same
RESET, LONGEST_PAUSE = re.compile(r"\bt=(\d{1,6})\b"), 300  # seconds
PASSING = (408, 425, 429)  # answers 4xx that another try may change


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


def is_on_hub(given: str | Path) -> bool:
    """Whether something of the Hub is named, as `hf://`."""
    return str(given).lower().startswith(f"{HUB}:")


def kept_as(url: str) -> str:
    """What a folder of our cache is called that is of an address."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def named(given: str | Path) -> str:
    """A path, an address or a name on the Hub, for people."""
    return address(given) or ON_HUB.sub(f"{HUB}://", str(given))


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


def tried(call: Callable[[], T]) -> T:
    """What `call` gives, asked again where it fails by what may pass. Raises what it raises."""
    for number in range(TRIES - 1):
        try:
            return call()
        except Exception as error:  # of many libraries: network, permission
            if isinstance(error, FINAL) or _is_refusal(error):
                raise
            time.sleep(max(PAUSE_SECONDS * 2**number, _asked_pause(error)))
    return call()


def _is_refusal(error: Exception) -> bool:
    """Whether a web server said that it will not, by the numbers that libraries give of it."""
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", 0))
    return isinstance(status, int) and 400 <= status < 500 and status not in PASSING


def _asked_pause(error: Exception) -> int:
    """The seconds after which a web server wants to be asked again, where it says so: all of them
    do it in one header, and the Hub in another one."""
    answer = getattr(error, "response", error)
    headers = getattr(answer, "headers", None) or {}
    told = f"t={headers.get('Retry-After', '')};{headers.get('RateLimit', '')}"
    return min(max(map(int, RESET.findall(told)), default=0), LONGEST_PAUSE)


def remote_size(url: str) -> int | None:
    """Bytes of a file at an address; None where nobody says. Raises UserError where it is not
    there."""
    try:
        return _size(*file_system(url))
    except Exception as error:  # as above
        raise _said(url, error) from None


def read_small(url: str) -> bytes:
    """A file of at most MAX_SMALL_BYTES, as it is now. Raises UserError, and FileNotFoundError
    where there is none."""
    files, path = file_system(url)

    def read() -> bytes:
        files.invalidate_cache()
        size = _size(files, path)
        if size is None:  # who makes a file while it is sent counts nothing
            with files.open(path, "rb") as stream:
                data = bytes(stream.read(MAX_SMALL_BYTES + 1))
        else:
            data = bytes(files.cat_file(path)) if size <= MAX_SMALL_BYTES else b""
        if max(size or 0, len(data)) > MAX_SMALL_BYTES:
            raise UserError(f"{url} is too large", f"{size or len(data)} bytes")
        return data

    try:
        return tried(read)
    except FileNotFoundError:
        raise
    except Exception as error:  # as above
        raise _said(url, error) from None


def _size(files: Any, path: str) -> int | None:
    size = tried(lambda: files.info(path))["size"]
    return None if size is None else int(size)


def _said(url: str, error: Exception) -> UserError:
    return error if isinstance(error, UserError) else unreadable(url, error)
