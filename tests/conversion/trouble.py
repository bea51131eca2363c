"""What befalls the workers of a test's cluster while they stamp shards. Dask loads this file in
each of them as it begins, so that one that is started anew for a killed one has it too."""

import fcntl
import json
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.conversion import shard_form
from ane_moe.files import write_text

VARIABLE = "ANE_MOE_TROUBLE"
SMALLEST = 10_000  # bytes that a worker may write to a file whose disk is said to be full


@dataclass(frozen=True)
class Trouble:
    """Facts that workers look up in `folder` at each shard, and what they leave there."""

    folder: Path

    def begin(self, seconds: float = 0, deadly: str = "", full: tuple[int, ...] = ()) -> None:
        """From now on a shard takes so many `seconds` more, the worker that begins the shard
        `deadly` is killed, and those of the names `full` cannot write; what was left is gone."""
        for path in (*self.folder.glob("running-*"), *self.folder.glob("stamped")):
            path.unlink()
        facts = {"seconds": seconds, "deadly": deadly, "full": full}
        write_text(self.folder / "facts", json.dumps(facts))

    def running(self) -> dict[int, str]:
        """The shard that each process stamps, or was at when it was killed."""
        found = {path: path.read_text() for path in self.folder.glob("running-*")}
        return {int(path.name.partition("-")[2]): text for path, text in found.items()}

    def stamped(self) -> list[tuple[int, str]]:
        """Process and shard of whatever was written to its end."""
        path = self.folder / "stamped"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), shard) for pid, shard in map(str.split, lines)]


def dask_setup(worker: Any) -> None:
    folder, stamp = Path(os.environ[VARIABLE]), shard_form.stamp

    def troubled(templates: Any, values: Any, key: Any, path: Path, *rest: Any) -> Any:
        facts = json.loads((folder / "facts").read_text())
        shard, mark = f"{path.parent.name}/{path.name}", folder / f"running-{os.getpid()}"
        write_text(mark, shard)
        time.sleep(facts["seconds"])
        if shard == facts["deadly"]:
            os.kill(os.getpid(), signal.SIGKILL)
        free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if worker.name in facts["full"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, hard))
        try:
            written = stamp(templates, values, key, path, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
            mark.unlink()
        with (folder / "stamped").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{os.getpid()} {shard}\n")
        return written

    shard_form.stamp = troubled
