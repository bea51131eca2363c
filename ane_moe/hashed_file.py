"""A file that is written once: hashed on the way, and past the page cache where it is large.

Filling the page cache took up to ten times the processor time of writing past it, and drives out
what is read; a conversion's output is read again when all of it is there, if at all.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PIECE = 1 << 20  # bytes hashed and written at once
PAST_THE_CACHE = getattr(os, "O_DIRECT", 0)


class HashedFile:
    """A file being written; `sha256` (hex) is of all of it once it is closed. Raises OSError when
    the disk is full.

    Pieces are hashed and written by a thread, while the caller makes the next one; what is smaller
    than a piece is done by the caller when the file is closed.
    """

    def __init__(self, path: Path):
        self.sha256 = ""
        self._file, self._hasher = FileIO(path, "w"), hashlib.sha256()
        self._filling, self._other = (mmap.mmap(-1, PIECE) for _ in range(2))  # aligned to pages
        self._filled = 0
        self._thread: ThreadPoolExecutor | None = None
        self._written: Future[None] = Future()  # the piece before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._thread:
                self._thread.shutdown()
            self._file.close()

    def write(self, data: Any) -> None:
        """Append bytes, which may change as soon as this returns."""
        view = memoryview(data).cast("B")
        while view:
            part = view[: PIECE - self._filled]
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == PIECE:
                self._send()

    def _send(self) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "file-writer")
            self._go_around(PAST_THE_CACHE)
        else:
            self._written.result()
        self._written = self._thread.submit(self._put, memoryview(self._filling))
        self._filling, self._other, self._filled = self._other, self._filling, 0

    def _finish(self) -> None:
        if self._thread:
            self._written.result()
            self._go_around(0)  # the rest is not of whole pages
        self._put(memoryview(self._filling)[: self._filled])
        self.sha256 = self._hasher.hexdigest()

    def _put(self, piece: memoryview) -> None:
        self._hasher.update(piece)
        while piece:
            try:
                piece = piece[self._file.write(piece) :]
            except OSError as error:
                # File systems may know the flag, and refuse what is written so.
                if error.errno != errno.EINVAL or not self._go_around(0):
                    raise

    def _go_around(self, flag: int) -> bool:
        """Write past the page cache from now on, or through it; whether that is a change."""
        now = fcntl.fcntl(self._file, fcntl.F_GETFL)
        with suppress(OSError):  # what the file system does not know
            fcntl.fcntl(self._file, fcntl.F_SETFL, now & ~PAST_THE_CACHE | flag)
        return fcntl.fcntl(self._file, fcntl.F_GETFL) != now
