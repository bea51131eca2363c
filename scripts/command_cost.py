"""What a command costs: wall time, processor time and peak memory of it and all its children."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

SAMPLE_SECONDS = 0.05
# Adding up the pages of a process that maps 8 GB takes so long, and holds it up meanwhile, that a
# program took three times as long for being watched.
WATCHED_SHARE = 0.03


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
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = _Watch(process)
    watcher = threading.Thread(target=watch.run)
    watcher.start()
    stdout, stderr = process.communicate()
    if sync:
        subprocess.run(["sync"], check=True)
    wall = time.monotonic() - started
    watcher.join()
    cpu = sum(watch.cpu_seconds.values())
    return Cost(wall, cpu, watch.peak_bytes, process.returncode, stdout, stderr)


class _Watch:
    """Samples a process and its children while it runs. What the system adds up at the end leaves
    out children of which nobody awaited the end."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self.process = process
        self.peak_bytes = 0
        self.cpu_seconds: dict[int, float] = {}  # by process

    def run(self) -> None:
        while self.process.poll() is None:
            started = time.monotonic()
            together = sum(map(self._resident, _processes(self.process.pid)))
            self.peak_bytes = max(self.peak_bytes, together)
            taken = time.monotonic() - started
            self._wait(max(SAMPLE_SECONDS, taken / WATCHED_SHARE))

    def _wait(self, seconds: float) -> None:
        """So long, or until the process ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _resident(self, process: psutil.Process) -> int:
        try:
            times, used = process.cpu_times(), process.memory_full_info()
        except psutil.Error:  # it ended
            return 0
        self.cpu_seconds[process.pid] = times.user + times.system
        return int(getattr(used, "pss", used.uss))  # macOS has no proportional size


def _processes(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:  # it ended
        return []
