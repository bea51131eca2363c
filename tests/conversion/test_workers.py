"""Worker processes: calls that follow others begin as soon as these are done, and stop when one
fails."""

import os
import subprocess
import sys

import psutil
import pytest

from ane_moe.conversion.workers import open_pool, run_then


def first(number):
    return number


def second(number, letter):
    return f"{number}{letter}", os.getpid()


def then(number):
    return [(number, letter) for letter in "ab"[:number]]


def failing(number):
    if number == 1:
        raise ValueError("one")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_following_calls_come_of_every_first_one(workers):
    with open_pool(workers, "ane_moe.errors") as pool:
        found = list(run_then(pool, first, [(0,), (1,), (2,)], second, then))
    assert sorted(label for label, _ in found) == ["1a", "2a", "2b"]
    assert (os.getpid() in {process for _, process in found}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_first_call_ends_all(workers):
    with open_pool(workers, "ane_moe.errors") as pool, pytest.raises(ValueError, match="one"):
        list(run_then(pool, failing, [(1,), (2,)], second, then))


def test_without_a_pool_following_calls_are_not_put_off():
    seen = []

    def note(number):
        seen.append(number)
        return number

    results = run_then(None, note, [(1,), (2,)], second, then)
    next(results)
    assert seen == [1]


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
