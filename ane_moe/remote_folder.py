"""A folder at an address, to be written: each file is there whole or not at all where the store
puts it so, as object stores do; elsewhere it is whole unless a writer was killed."""

import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.addresses import file_system, read_small, reason_of, tried, unreadable
from ane_moe.errors import DiskFull, UserError
from ane_moe.files import disk_error, replaced, require_room, sha256, temporary_folder

KEPT_SECONDS = 300  # of a file that nobody has open: the next call may want it again
_FETCHING = threading.Lock()


@dataclass(frozen=True)
class RemoteFolder:
    """The files below `url`, by their paths there. Methods raise UserError where they cannot be
    had, or written."""

    url: str

    def __str__(self) -> str:
        return self.url

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each file `below` a path, as it is now; of none where nothing is there. Names
        that lead out of a folder, which a store may have, are left out."""
        files, root = self._place()
        top = f"{root}/{below}".rstrip("/")

        def find() -> dict[str, Any]:
            files.invalidate_cache()
            return dict(files.find(top, detail=True))

        try:
            found = tried(find)
        except FileNotFoundError:
            return {}
        except Exception as error:  # of many libraries: network, permission
            raise unreadable(self.url, error) from None
        start = len(root.rstrip("/")) + 1
        named = {path[start:]: int(one["size"] or 0) for path, one in found.items()}
        return {name: size for name, size in named.items() if _is_inside(name)}

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return read_small(f"{self.url}/{name}")
        except FileNotFoundError:
            return None

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        files, root = self._place()
        try:
            return bool(tried(lambda: files.isfile(f"{root}/{name}")))
        except Exception as error:  # as above
            raise unreadable(f"{self.url}/{name}", error) from None

    def fetch(self, name: str, path: Path, writer: str = "") -> None:
        """Bring a file to `path`; `writer` is as of `replaced`."""
        files, root = self._place()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path, writer) as temporary:
                tried(lambda: files.get_file(f"{root}/{name}", str(temporary)))
        except Exception as error:  # as above
            if isinstance(full := disk_error(error, path), DiskFull):
                raise full from None
            raise unreadable(f"{self.url}/{name}", error) from None

    def send(self, path: Path, name: str) -> None:
        """Put the file at `path` there, in the place of what was there."""
        files, root = self._place()
        self._changed(name, lambda: files.put_file(str(path), f"{root}/{name}"))

    def write(self, name: str, text: str) -> None:
        """Put a file of this text there."""
        with temporary_folder() as scratch:
            path = scratch / "text"
            path.write_text(text, encoding="utf-8")
            self.send(path, name)

    def remove(self, name: str) -> None:
        """Delete a file that may be there."""
        files, root = self._place()

        def gone() -> None:
            with suppress(FileNotFoundError):
                files.rm_file(f"{root}/{name}")

        self._changed(name, gone)

    def require_room(self, names: Collection[str], folder: Path) -> None:
        """Raise DiskFull where files that `folder` lacks do not fit into it, as far as the store
        lists them. A web server is not asked: it lists a folder at a time, if at all."""
        if self.url.startswith("http"):
            return
        sizes = self.sizes()
        lacking = (name for name in names if not (folder / name).is_file())
        require_room(folder, sum(sizes.get(name, 0) for name in lacking), self.url)

    def fetch_checked(self, digests: Mapping[str, str], folder: Path) -> None:
        """Bring files into `folder`, but for those that are there by their sha256 (hex)."""
        for name, digest in digests.items():
            path = folder / name
            if path.is_file() and sha256(path) == digest:
                continue
            self.fetch(name, path)
            if (found := sha256(path)) != digest:
                path.unlink()
                raise UserError(
                    f"{self.url}/{name} is not the file that was written",
                    f"sha256 {found[:12]}, not {digest[:12]}",
                    "somebody else writes there, or it was damaged",
                )

    def replace_group(self, folder: Path, names: Sequence[str]) -> None:
        """Put files of `folder` there that are one thing, the last of which tells which one: it
        is put when the others are there, and is never beside others than its own."""
        *others, last = names
        told = self.read(last)
        if told is not None and told != (folder / last).read_bytes():
            self.remove(last)
        for name in (*others, last):
            self.send(folder / name, name)

    def _place(self) -> tuple[Any, str]:
        return file_system(self.url)

    def _changed(self, name: str, change: Callable[[], None]) -> None:
        try:
            tried(change)
        except Exception as error:  # as above
            raise UserError(
                f"{self.url}/{name} cannot be written",
                reason_of(error),
                "check permission, room and the network; what is finished there is kept",
            ) from None


@dataclass(frozen=True)
class SentFile:
    """A file at an address, known by its sha256 (hex): workers fetch it once."""

    folder: RemoteFolder
    name: str
    sha256: str


@contextmanager
def at_hand(file: Path | SentFile) -> Iterator[Path]:
    """Where the file can be opened, for the length of the block: one at an address in a scratch
    folder of this process, gone with it, or when nobody has wanted it for a while. Raises
    UserError."""
    if isinstance(file, Path):
        yield file
        return
    with _FETCHING:  # of threads that ask at once
        here = _fetched.get(file) or _Fetched(file)
        _fetched[file] = here
        here.users += 1
        here.end.cancel()
    try:
        yield here.path
    finally:
        with _FETCHING:
            here.users -= 1
            if not here.users:
                here.end = threading.Timer(KEPT_SECONDS, _forget, (file, here))
                here.end.daemon = True
                here.end.start()


class _Fetched:
    """A file that was sent, here, and how many have it open."""

    def __init__(self, file: SentFile):
        self.scratch = tempfile.TemporaryDirectory(prefix="ane-moe-")
        self.path, self.users = Path(self.scratch.name) / file.name, 0
        self.end = threading.Timer(0, lambda: None)  # when it goes
        file.folder.fetch_checked({file.name: file.sha256}, Path(self.scratch.name))


_fetched: dict[SentFile, _Fetched] = {}


def _forget(file: SentFile, here: _Fetched) -> None:
    with _FETCHING:
        if not here.users and here.end is threading.current_thread():
            _fetched.pop(file)
            here.scratch.cleanup()


def _is_inside(name: str) -> bool:
    """Whether a file of this name lies in the folder wherever that is."""
    return bool(name) and not {"", ".", ".."} & {*name.split("/")} and not {*name} & {"\\", "\0"}
