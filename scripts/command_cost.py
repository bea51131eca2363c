"""What a command costs: wall time, processor time and peak memory of it and all its children."""

import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes as the operating system counts them. Pages that processes share count
    once."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int
    stdout: str
    stderr: str


def cost_of(command: Sequence[str], sync: bool = False) -> Cost:
    """Run `command`; with `sync` the time ends when what it wrote is on the disk.

    Without that, a copy may take anything between the speed of memory and that of the disk,
    depending on what others have written.
    """
    if sync:
        subprocess.run(["sync"], check=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    stdout, stderr = process.communicate()
    if sync:
        subprocess.run(["sync"], check=True)
    wall = time.monotonic() - started
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak[0], process.returncode, stdout, stderr)


def _watch(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(_resident, _processes(process.pid))))
        time.sleep(SAMPLE_SECONDS)


def _processes(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:  # it ended
        return []


def _resident(process: psutil.Process) -> int:
    try:
        used = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(used, "pss", used.uss))  # macOS has no proportional size
