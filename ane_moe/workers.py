"""Worker processes of a conversion, and what they use of memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")

Pool = ProcessPoolExecutor | None       # None: everything in this process


def open_pool(workers: int, preload: str) -> AbstractContextManager[Pool]:
    """Worker processes. Off macOS they are forked from a server that has imported the module `preload` once; macOS
    frameworks do not survive a fork."""
    if workers == 1:
        return nullcontext()
    context = get_context("spawn" if psutil.MACOS else "forkserver")
    if not psutil.MACOS:
        context.set_forkserver_preload([preload])
    # One thread each: the workers are the parallelism, and waiting OpenMP threads would spin on each other's cores.
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def start(pool: Pool, function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Begin one call beside the rest; without a pool it is done at once."""
    if pool is not None:
        return pool.submit(function, *arguments)
    future: Future[T] = Future()
    future.set_result(function(*arguments))
    return future


def run(pool: Pool, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """The results of `calls`, as they come; on the first error or Ctrl-C nothing new is begun."""
    if pool is None:
        yield from (function(*arguments) for arguments in calls)
        return
    futures = [pool.submit(function, *arguments) for arguments in calls]
    try:
        yield from (future.result() for future in as_completed(futures))
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
