"""Files and folders that are there whole or not at all, and what a killed run leaves behind.

Whatever is written goes under a temporary name beside its place first (`.writing-NAME`) and is
renamed when it is complete. A run that is killed leaves such names; the next conversion sweeps them
(conversion/output_folder.py).
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ane_moe.errors import DiskFull, UserError

TEMPORARY = ".writing-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replaced(path: Path, writer: str = "") -> Iterator[Path]:
    """A temporary path to write to, a file or a folder, that takes the place of `path` when the
    block is left without an error. Those who may write the same path at once give a name of their
    own as `writer`: whoever is done last is there to stay."""
    temporary = path.with_name(f"{TEMPORARY}{writer}{path.name}")
    _remove(temporary)
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        _remove(temporary)


def _take_place(temporary: Path, path: Path) -> None:
    """A folder takes no other's place: what is there goes aside first, and another writer may put
    his own there meanwhile."""
    aside = temporary.with_name(f"{temporary.name}.before")
    _remove(aside)
    while True:
        if path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                os.replace(path, aside)
                shutil.rmtree(aside)
        try:
            return os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextmanager
def named_by_user(path: Path) -> Iterator[Path]:
    """`replaced`, for a file whose name the user gave. Raises UserError where it cannot be
    written."""
    try:
        with replaced(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"{path} cannot be written", str(error.strerror), "name another file"
        ) from None


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder among the system's temporary ones, for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="ane-moe-") as folder:
        yield Path(folder)


@contextmanager
def scratch_folder(beside: Path, name: str) -> Iterator[Path]:
    """An empty folder in `beside` for the length of the block; it stays after a kill."""
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{name}-", dir=beside) as folder:
        yield Path(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_named_by_user(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises UserError where that is not possible."""
    with named_by_user(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def disk_error(error: Exception, path: Path) -> Exception:
    """A DiskFull when `error`, of writing `path`, looks like a full disk, or a used up quota, else
    the error itself."""
    free = free_bytes(path.parent)
    full = getattr(error, "errno", None) in FULL
    if full or (isinstance(error, RuntimeError) and free < 1 << 26):
        what, do = (
            f"the disk is full: {path.name} was not written",
            "free some space and run the same command again",
        )
        return DiskFull(what, f"{free / 1e6:.0f} MB free", do)
    return error


def require_room(folder: Path, needed: int, what: object) -> None:
    """Raise DiskFull where a folder has fewer bytes free than are `needed` for something."""
    if needed > (free := free_bytes(folder)):
        found = f"{free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed"
        raise DiskFull(f"the disk is too full for {what}", found, "free some space, and try again")


def free_bytes(folder: Path) -> int:
    """What is free where a folder is, or is to be."""
    place = folder.absolute()
    return shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free


def is_hidden(path: Path) -> bool:
    """Whether a file is none of a conversion's: `.DS_Store` of Finder, editors' and file systems'
    own."""
    return path.name.startswith(".")


def sha256(path: Path) -> str:
    """sha256 of one file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
