"""A cluster that a batch system starts for one conversion, as a TOML file names it: the scheduler
in this process, the workers in jobs that dask-jobqueue submits."""

import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError

# dask-jobqueue's class, and what submits a job.
SYSTEMS = {
    "slurm": ("SLURMCluster", "sbatch"),
    "pbs": ("PBSCluster", "qsub"),
    "sge": ("SGECluster", "qsub"),
    "lsf": ("LSFCluster", "bsub"),
    "oar": ("OARCluster", "oarsub"),
    "moab": ("MoabCluster", "msub"),
}
WAIT_MINUTES = 60  # for a first job to begin
# Entries that go to dask-jobqueue, their types, and its names for them.
ENTRIES: dict[str, tuple[type, str]] = {
    "cores": (int, "cores"),
    "memory": (str, "memory"),
    "queue": (str, "queue"),
    "account": (str, "account"),
    "walltime": (str, "walltime"),
    "interface": (str, "interface"),
    "python": (str, "python"),
    "log_folder": (str, "log_directory"),
    "directives": (list, "job_extra_directives"),
    "before": (list, "job_script_prologue"),
}
OWN: dict[str, type] = {"system": str, "jobs": int, "wait_minutes": int}
NEEDED = ("system", "jobs", "cores", "memory")


@dataclass(frozen=True)
class BatchSystem:
    """`jobs` jobs of the batch system `name`, each of `options["cores"]` workers with one thread;
    the first has to begin within `wait_minutes`."""

    name: str
    jobs: int
    wait_minutes: int
    options: dict[str, Any]

    @property
    def advice(self) -> str:
        """What to do where no job begins."""
        logs = self.options.get("log_directory", "the folder that it was submitted from")
        return f"look at the queue of {self.name}, and at the log of a job in {logs}"


def read_batch_system(path: Path) -> BatchSystem:
    """The file that names how to start a cluster. Raises UserError."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error.strerror)) from None
    except ValueError as error:
        raise UserError(f"{path} is not TOML", str(error)) from None
    types = OWN | {name: kind for name, (kind, _) in ENTRIES.items()}
    if unknown := sorted(found.keys() - types.keys()):
        raise UserError(
            f"{path} has unknown entries", ", ".join(unknown), f"known: {', '.join(types)}"
        )
    if lacking := [name for name in NEEDED if name not in found]:
        raise UserError(f"{path} lacks {', '.join(lacking)}", do="docs/cluster.md has an example")
    for name, value in found.items():
        kind = types[name]
        texts = kind is not list or all(isinstance(one, str) for one in value)
        if type(value) is not kind or not texts or (isinstance(value, int) and value < 1):
            wanted = {int: "a whole number from 1", str: "a text", list: "a list of texts"}[kind]
            raise UserError(f"{path}: {name} is not {wanted}", repr(value))
    if found["system"] not in SYSTEMS:
        raise UserError(
            f"{path}: no such batch system", repr(found["system"]), f"known: {', '.join(SYSTEMS)}"
        )
    options = {name: found[own] for own, (_, name) in ENTRIES.items() if own in found}
    waits = found.get("wait_minutes", WAIT_MINUTES)
    return BatchSystem(found["system"], found["jobs"], waits, options)


@contextmanager
def _interrupted_as_before() -> Iterator[None]:
    """dask-jobqueue makes Ctrl-C a quiet exit as soon as it is imported (runner.py)."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def started(batch: BatchSystem) -> Iterator[str]:
    """The address of a scheduler in this process, for which the jobs have been submitted; one that
    ends is submitted again. They are cancelled when the block is left. Raises UserError."""
    name, command = SYSTEMS[batch.name]
    if find_spec("dask_jobqueue") is None:
        raise UserError(
            "a batch system needs another package",
            "no dask-jobqueue",
            "pip install 'ane-moe[cluster]'",
        )
    if shutil.which(command) is None:
        raise UserError(
            f"there is no {command} here", do="run this where jobs of the system are submitted"
        )
    with _interrupted_as_before():
        import dask_jobqueue
    with _made(getattr(dask_jobqueue, name), batch) as cluster:
        cluster.adapt(minimum_jobs=batch.jobs, maximum_jobs=batch.jobs)
        yield cluster.scheduler_address


def _made(kind: Callable[..., Any], batch: BatchSystem) -> Any:
    cores = batch.options["cores"]
    try:
        return kind(processes=cores, scheduler_options={"dashboard_address": ":0"}, **batch.options)
    except (OSError, RuntimeError, ValueError) as error:  # of a size, or a network, that is none
        raise UserError(
            f"a cluster of {batch.name} does not begin", str(error), "look at the file's entries"
        ) from None
