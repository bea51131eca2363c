"""Worker processes: calls begin as soon as they are there, and stop when one fails."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from ane_moe.conversion import stamping
from ane_moe.conversion.workers import open_pool, run
from ane_moe.formats.recipe import find_format


def labelled(number, letter="a"):
    return f"{number}{letter}", os.getpid()


def failing(number):
    if number == 1:
        raise ValueError("one")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_call_has_its_result(workers):
    with open_pool(workers, "ane_moe.errors") as pool:
        found = list(run(pool, labelled, [(1, "a"), (2, "a"), (2, "b")]))
    assert sorted(label for label, _ in found) == ["1a", "2a", "2b"]
    assert (os.getpid() in {process for _, process in found}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_call_begins_before_the_next_one_is_there(workers):
    with open_pool(workers, "ane_moe.errors") as pool:

        def calls():
            yield (1,)
            if pool:  # the first call is done while this process still makes the second
                deadline = time.monotonic() + 60
                while pool._work_ids.qsize() or pool._pending_work_items:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            yield (2,)

        results = run(pool, labelled, calls())
        assert next(results)[0] == "1a"
        assert [label for label, _ in results] == ["2a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_call_ends_all(workers):
    with open_pool(workers, "ane_moe.errors") as pool, pytest.raises(ValueError, match="one"):
        list(run(pool, failing, [(1,), (2,)]))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_what_makes_the_calls_ends_all(workers):
    def calls():
        yield (0,)
        raise ValueError("of the second call")

    with open_pool(workers, "ane_moe.errors") as pool, pytest.raises(ValueError, match="second"):
        list(run(pool, failing, calls()))


def test_without_a_pool_calls_are_not_put_off():
    seen = []

    def note(number):
        seen.append(number)
        return number

    next(run(None, note, [(1,), (2,)]))
    assert seen == [1]


def test_a_worker_that_stamps_imports_neither_torch_nor_coremltools():
    with open_pool(2, stamping.__name__) as pool:
        assert pool.submit(modules_of_a_worker).result() == []


def modules_of_a_worker():
    """Loaded ones that take seconds to load, once a shard of palettes was encoded."""
    import numpy as np

    for name in ("int8", "lut4", "lut4+scale", "sparse50+lut4"):
        find_format(name).encode(np.ones((4, 8), np.float16))
    return [name for name in ("torch", "coremltools", "transformers") if name in sys.modules]


KILLED = """
import os, sys, time
from ane_moe.conversion.workers import open_pool

if __name__ == "__main__":
    with open_pool(2, "ane_moe.errors") as pool:
        waiting = [pool.submit(time.sleep, 600) for _ in range(2)]
        pool.submit(os.getpid)
        while len(pool._processes) < 2 or not all(process.is_alive() for process in pool._processes.values()):
            time.sleep(0.05)
        print(*pool._processes, flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "main.py").write_text(KILLED)
    with subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(worker.is_running() for worker in workers)
        parent.kill()
        assert not psutil.wait_procs(workers, timeout=30)[1]
