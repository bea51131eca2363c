"""Those who do a conversion's calls: processes of this machine, or a cluster's workers."""

import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from ane_moe.conversion.admission import Admission

T = TypeVar("T")

Pool = Executor | None  # None: everything in this process


class Workers(Protocol):
    """Who does the calls of a conversion."""

    def admit(self, needed: Admission) -> None:
        """Check that all of them have it, packages in our versions. Raises UserError."""

    def readers(self) -> AbstractContextManager[Pool]:
        """For calls that read and hash."""

    def writers(self) -> AbstractContextManager[Pool]:
        """For calls that write shards."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on those who were left out meanwhile."""


@dataclass(frozen=True)
class LocalWorkers:
    """`count` processes of this machine, begun when there is something to write."""

    count: int
    preload: str

    def admit(self, needed: Admission) -> None:
        """They see what this process sees."""

    def readers(self) -> AbstractContextManager[Pool]:
        return ThreadPoolExecutor(self.count)  # hashing frees the interpreter's lock

    def writers(self) -> AbstractContextManager[Pool]:
        return open_pool(self.count, self.preload)

    @property
    def notes(self) -> tuple[str, ...]:
        return ()


def open_workers(
    count: int, preload: str, cluster: str | None, out: Path
) -> AbstractContextManager[Workers]:
    """`count` processes of this machine, or the workers of the `cluster`: the address of its
    scheduler, or a .toml file that says how to start it. Raises UserError."""
    if cluster is None:
        return nullcontext(LocalWorkers(count, preload))
    from ane_moe.conversion.cluster import open_cluster

    return open_cluster(cluster, out)


def prepare(workers: int, preload: str) -> None:
    """Begin what `open_pool` needs, seconds of imports, while the caller goes on with its own."""
    if workers > 1 and not psutil.MACOS:
        forkserver.set_forkserver_preload([preload])
        forkserver.ensure_running()


def open_pool(workers: int, preload: str) -> AbstractContextManager[Pool]:
    """Worker processes. Off macOS they are forked from a server that has imported the module
    `preload` once; macOS frameworks do not survive a fork."""
    if workers == 1:
        return nullcontext()
    prepare(workers, preload)
    context = get_context("spawn" if psutil.MACOS else "forkserver")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """One thread: the workers are the parallelism, and waiting OpenMP threads, of what imports
    torch, would spin on each other's cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A killed parent tells nobody: its workers would wait for calls for ever, or write into what a
    new run writes."""
    parent.join()
    os._exit(1)


def start(pool: Pool, function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Begin one call beside the rest; without a pool it is done at once."""
    if pool is not None:
        return pool.submit(function, *arguments)
    future: Future[T] = Future()
    future.set_result(function(*arguments))
    return future


def run(pool: Pool, function: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """The results of `calls`, as they come. Calls begin as soon as the iterable gives them; on the
    first error or Ctrl-C nothing new is begun."""
    if pool is None:
        yield from (function(*arguments) for arguments in calls)
        return
    pending: set[Future[T]] = set()
    try:
        for arguments in calls:
            pending.add(pool.submit(function, *arguments))
            done, pending = wait(pending, timeout=0)
            yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(pending))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def this_process() -> str:
    """What tells this process from those of other machines, too; it may be part of a file name."""
    return f"{platform.node()}-{os.getpid()}"


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
