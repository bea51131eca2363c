"""Who fetches into a folder of this machine: one run at a time, so that an interrupted download
goes on in one place."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ane_moe.progress import Progress, silent
from ane_moe.user_cache import user_cache


@contextmanager
def one_run(folder: Path, progress: Progress = silent) -> Iterator[None]:
    """Whoever fetches into `folder` waits here for who does so already."""
    progress("waiting for another run that fetches it", 0, 1)
    path = lock_of(folder, user_cache())
    with ExitStack() as stack:
        with suppress(OSError):  # a cache that cannot be written, a file system without locks
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
            os.utime(path)  # when the folder was wanted last
        yield


@contextmanager
def if_free(folder: Path, cache: Path) -> Iterator[bool]:
    """Whether nobody fetches into a folder of a `cache`; in the block nobody begins to."""
    path = lock_of(folder, cache)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # one that is locked, a file system without locks
            yield False
        else:
            yield True


def lock_of(folder: Path, cache: Path) -> Path:
    """The file of a `cache` that is locked while `folder` is written."""
    place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    return cache / "fetching" / place


def this_writer() -> str:
    """What `files.replaced` calls this process: where locks do not work, runs may fetch the same
    at once."""
    return f"{os.getpid()}-"
