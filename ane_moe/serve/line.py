"""The line before a model: one job runs at a time in a thread of its own, a bounded number waits.

What a job gives is handed to the event loop that it was made in, and waits there for its reader: a
slow reader holds up nobody else.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from time import perf_counter
from typing import Any, Generic, TypeVar

T = TypeVar("T")
IsHalted = Callable[[], bool]


class Full(Exception):
    """There is no place to wait in."""


class Closed(Exception):
    """The line was closed before the job came to its end."""


class Job(Generic[T]):
    """The values of `work`, which asks `halted` whether to go on. Iterate for them, once; it raises
    what the work raised, and Closed."""

    def __init__(self, work: Callable[[IsHalted], Iterator[T]], handed: Callable[[float], None]):
        self._work = work
        self._handed = handed  # told how long a value was on its way
        self._loop = asyncio.get_running_loop()
        self._values: asyncio.Queue[tuple[float, T | None, BaseException | None]] = asyncio.Queue()
        self._halted = False
        self.entered = perf_counter()

    def halt(self) -> None:
        """Have it end as soon as it can."""
        self._halted = True

    def run(self) -> None:
        """Do the work, in the calling thread."""
        try:
            for value in self._work(lambda: self._halted):
                if self._halted:
                    break
                self._hand(value, None)
            self.end(Closed() if self._halted else None)
        except BaseException as error:  # whatever it is, its client is told
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Let the reader go, with an error where there is one."""
        self._hand(None, error)

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            sent, value, error = await self._values.get()
            self._handed(perf_counter() - sent)
            if error is not None:
                raise error
            if value is None:
                return
            yield value

    def _hand(self, value: T | None, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._values.put_nowait, (perf_counter(), value, error))


class Line:
    """At most `places` jobs wait while one runs. `handed` is told, in seconds, how long each of the
    line's own steps took: from the end of a job to the beginning of the one that waited for it, and
    from a value to its reader."""

    def __init__(self, places: int, handed: Callable[[float], None] = lambda _: None) -> None:
        self._places = places
        self._handed = handed
        self._changed = threading.Condition()
        self._waiting: deque[Job[Any]] = deque()
        self._running: Job[Any] | None = None
        self._closed = False
        self._free_since = perf_counter()
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    def enter(self, work: Callable[[IsHalted], Iterator[T]]) -> Job[T]:
        """A job at the end of the line, to be read in this event loop. Raises Full and Closed."""
        job = Job(work, self._handed)
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) + self.running > self._places:
                raise Full
            self._waiting.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job[Any]) -> None:
        """Have a job end, whether it waits or runs; nothing happens where it has ended."""
        job.halt()
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def close(self) -> None:
        """Let nobody in any more, end what runs and who waits, and wait for the thread."""
        with self._changed:
            self._closed = True
            left, self._waiting = [*self._waiting], deque()
            if self._running:
                self._running.halt()
            self._changed.notify()
        for job in left:
            job.end(Closed())
        self._thread.join()

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            self._handed(perf_counter() - max(job.entered, self._free_since))
            job.run()
            with self._changed:
                self._running = None
                self._free_since = perf_counter()

    def _next(self) -> Job[Any] | None:
        """The job that is longest in the line; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running
