"""What the stand-in does instead of answering: one JSON object in the file that ANE_MOE_STANDIN
names."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "ANE_MOE_STANDIN"


@dataclass(frozen=True)
class Script:
    """`compile`, `load`, `predict`: ok, or a fault: error, crash (exit 3), kill (SIGKILL), abort
    (SIGABRT), hang.

    `predict` may also be `fp32` (outputs carry more than fp16 holds), `wrong` (3 + 2x), `missing`
    (no outputs) or `misshapen`.
    `plan` is a name in plans.PLANS or a plan itself. `log`: a file that each native step is
    appended to. `converts`: new processes may convert models, and take the time to import what for.
    """

    compile: str = "ok"
    load: str = "ok"
    predict: str = "ok"
    plan: str | dict[str, Any] = "all_engine"
    macos: str = "15.5"
    build: str = "24F74"
    log: str = ""
    converts: bool = False
    messages: dict[str, str] = field(default_factory=dict)  # step -> text of its `error`

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def play(self, step: str, detail: str = "") -> str:
        """Log `step` and commit its fault, if it has one that is the process's; return what is
        scripted for it."""
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{step} {detail}\n")
        scripted = str(getattr(self, step))
        fault(scripted, self.messages.get(step, f"scripted {step} error"))
        return scripted


def fault(name: str, message: str) -> None:
    """Commit the fault `name`; return for any other name."""
    if name == "error":
        raise RuntimeError(user_info(message))
    if name == "crash":
        print(f"libc++abi: terminating: {message}", file=sys.stderr, flush=True)
        os._exit(3)
    if name in ("kill", "abort"):
        os.kill(os.getpid(), signal.SIGKILL if name == "kill" else signal.SIGABRT)
    if name == "hang":
        time.sleep(3600)


def user_info(message: str) -> str:
    """The text of a native error: an NSError's userInfo, printed (`Utils::handleError`)."""
    return f'{{\n    NSLocalizedDescription = "{message}";\n}}'


def current() -> Script:
    """The script in force; without one, everything works."""
    path = os.environ.get(VARIABLE)
    return Script(**json.loads(Path(path).read_text())) if path else Script()
