"""Who fetches into a folder of this machine: one run at a time, so that an interrupted download
goes on in one place. And who uses what was fetched: as many as want to, until they end."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ane_moe.files import TEMPORARY
from ane_moe.progress import Progress, silent
from ane_moe.user_cache import user_cache

FETCHING, USING = "fetching", "using"  # folders of the cache: files that are locked, and no more
# What this process has fetched or found fetched, by the lock: it is let go with its file.
in_use: dict[Path, IO[str]] = {}


@contextmanager
def one_run(folder: Path, progress: Progress = silent) -> Iterator[None]:
    """Whoever fetches into `folder` waits here for who does so already. What has arrived is in use
    for as long as this process lives."""
    progress("waiting for another run that fetches it", 0, 1)
    path = lock_of(folder, user_cache())
    with ExitStack() as stack:
        with suppress(OSError):  # a cache that cannot be written, a file system without locks
            fcntl.flock(stack.enter_context(_opened(path)), fcntl.LOCK_EX)
            os.utime(path)  # when the folder was wanted last
        yield
        _use(path.absolute().parents[1] / USING / path.name)


@contextmanager
def if_free(folder: Path, cache: Path) -> Iterator[bool]:
    """Whether nobody fetches into a folder of a `cache`, nor uses it; in the block nobody begins
    to."""
    path = lock_of(folder, cache)
    with ExitStack() as stack:
        try:
            for locked in (path, cache / USING / path.name):
                fcntl.flock(stack.enter_context(_opened(locked)), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # one that is locked, a file system without locks
            yield False
        else:
            yield True


def lock_of(folder: Path, cache: Path) -> Path:
    """The file of a `cache` that is locked while `folder` is written: one and the same however the
    two are spelled, and while the folder is set aside to be removed."""
    place, root = folder.resolve(), cache.resolve()
    place = place.relative_to(root) if place.is_relative_to(root) else place
    named = f"{place.parent}/{place.name.removeprefix(TEMPORARY)}"
    return cache / FETCHING / hashlib.sha256(os.fsencode(named)).hexdigest()[:32]


def _use(path: Path) -> None:
    """Nobody takes it exclusively until this process ends: the system lets go of it then."""
    if path in in_use:
        return
    with suppress(OSError):  # as above
        file = _opened(path)
        fcntl.flock(file, fcntl.LOCK_SH)
        in_use[path] = file


def _opened(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a+")  # network file systems ask for both, to share it and not to


def this_writer() -> str:
    """What `files.replaced` calls this process: where locks do not work, runs may fetch the same
    at once."""
    return f"{os.getpid()}-"
