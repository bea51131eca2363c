"""Load and first predict in a child process: what kills or hangs Core ML shall not kill or hang the
caller.

A package can bring Core ML down rather than make it fail: coremltools issue 2758 has a model whose
Neural Engine compilation fails unseen and whose first prediction then ends in SIGKILL. One child
serves every trial of a process until one of them ends it.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

from ane_moe.absent_modules import absent_modules
from ane_moe.errors import UserError

# Neural Engine compilation of a 3.2 GB model took 88 to 115 s on an M4 Max; five times that.
TIME_LIMIT_SECONDS = 600.0
GRACE_SECONDS = 10.0  # after which an orphaned child ends itself
TAIL_CHARACTERS = 500
OF_CONVERTERS = ("scipy", "torch", "transformers")
COMMAND = (sys.executable, "-m", "ane_moe.runtime.coreml.trial_child")

CAUSES = {
    signal.SIGKILL: "macOS does this when memory runs out, or when the Neural Engine "
    "cannot hold the model: convert "
    "with smaller shards, or try --units cpu_only",
    signal.SIGSEGV: "a crash inside Core ML, known for palettized weights and for functions "
    "it cannot load: try "
    "--units cpu_only, another weight format, or another macOS",
    signal.SIGABRT: "an assertion inside Core ML, often for shapes or types the compute unit "
    "has no form of: try "
    "--units cpu_only, or run `ane-moe verify` for the rules it breaks",
}
OTHER_CAUSE = (
    "a crash inside Core ML: try --units cpu_only, or run `ane-moe verify` for the rules the "
    "package breaks"
)
HANG_CAUSE = (
    "the Neural Engine compiler may still be at work on a large shard: convert with smaller "
    "shards, or give "
    "it more time"
)


@dataclass(frozen=True)
class Trial:
    """What the child loads and runs, and the cache it compiles into."""

    package: str
    function: str
    units: str
    cache_folder: str
    os_build: str
    limit_bytes: int


class TrialProcess:
    """A child that serves requests, one JSON line each way; `command` starts one that serves other
    than trials."""

    def __init__(self, command: tuple[str, ...] | None = None) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.process = subprocess.Popen(
            command or COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def ask(self, request: dict[str, Any], time_limit_seconds: float) -> dict[str, Any] | None:
        """The child's answer; None when it ended without one.

        Raises TimeoutError when the limit passes; the child is dead then.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        limited = {"request": request, "time_limit_seconds": time_limit_seconds}
        try:
            self.process.stdin.write(json.dumps(limited).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._line(self.process.stdout.fileno(), time.monotonic() + time_limit_seconds)
        return json.loads(answer) if answer.endswith(b"\n") else None

    def _line(self, descriptor: int, deadline: float) -> bytes:
        received = b""
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.end()
                raise TimeoutError
            chunk = os.read(descriptor, 65536)
            if not chunk:
                break
            received += chunk
        return received

    def end(self) -> int:
        """Kill the child if it still runs; its return code."""
        self.process.kill()
        self.process.communicate()
        return self.process.returncode

    def last_words(self) -> str:
        """The end of the child's stderr, on one line."""
        self.errors.seek(0)
        return " ".join(self.errors.read().decode(errors="replace").split())[-TAIL_CHARACTERS:]


_running: TrialProcess | None = None
_one_at_a_time = threading.Lock()


def try_function(trial: Trial, time_limit_seconds: float = TIME_LIMIT_SECONDS) -> None:
    """Load `trial.function` and run it on zeros in a child process.

    Raises UserError with the child's own error, or with what ended it (a signal, the time limit)
    and the usual cause.
    """
    global _running
    where = f"function {trial.function!r} of {trial.package}"
    with _one_at_a_time:
        child = (
            _running if _running is not None and _running.process.poll() is None else TrialProcess()
        )
        _running = None  # until it has answered
        try:
            answer = child.ask(asdict(trial), time_limit_seconds)
        except TimeoutError:
            raise UserError(
                f"Core ML did not finish loading and running {where}",
                f"no answer within {time_limit_seconds:g} s",
                HANG_CAUSE,
            ) from None
        except BaseException:  # Ctrl-C: the child would go on alone
            child.end()
            raise
        if answer is None:
            raise _ended(where, child)
        _running = child
    if "error" in answer:
        raise UserError(**answer["error"])


def stop() -> None:
    """End the child, which otherwise waits for more trials (and holds some 400 MB) as long as its
    parent lives."""
    global _running
    with _one_at_a_time:
        if _running is not None:
            _running.end()
        _running = None


def _ended(where: str, child: TrialProcess) -> UserError:
    child.process.wait()
    code = child.end()
    words = child.last_words()
    if code >= 0:
        return UserError(
            f"loading and running {where} ended the trial process",
            f"exit code {code}: {words}",
            OTHER_CAUSE,
        )
    number = signal.Signals(-code)
    return UserError(
        f"loading and running {where} killed the trial process",
        f"{number.name}{': ' + words if words else ''}",
        CAUSES.get(number, OTHER_CAUSE),
    )


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests from stdin until it closes. Core ML's own talk goes to stderr.

    The process converts nothing: coremltools is imported without what its converters need, three of
    its four seconds.
    """
    with absent_modules(*OF_CONVERTERS):
        importlib.import_module("ane_moe.coreml_tools")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        limited = json.loads(line)
        # Ends a child that hangs after its parent is gone; a signal needs no help from the
        # interpreter.
        signal.setitimer(signal.ITIMER_REAL, limited["time_limit_seconds"] + GRACE_SECONDS)
        answers.write(json.dumps(answer(limited["request"])) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
