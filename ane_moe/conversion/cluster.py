"""The workers of a `dask.distributed` cluster in the place of processes of this machine.

Every call is complete in itself: it brings its templates, reads the checkpoint from storage that
all machines share, or at an address, and writes to such storage under a name of its worker's own,
or to an address. A call whose worker dies is done again by another one. No more calls are sent than
workers have room for: the scheduler gives up a call that four workers died of, and counts those
that only waited there.
"""

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ane_moe
from ane_moe.addresses import from_anywhere
from ane_moe.checkpoints.weight_file import WeightFile, forget, size_of
from ane_moe.conversion.admission import Admission
from ane_moe.conversion.batch_system import read_batch_system, started
from ane_moe.errors import DiskFull, UserError
from ane_moe.files import TEMPORARY, scratch_folder
from ane_moe.remote_folder import RemoteFolder
from ane_moe.wording import listed

PACKAGES = ("ane-moe", "coremltools", "torch", "numpy", "scipy", "protobuf")
SOURCE = "source of ane-moe"  # two checkouts have one version
RESOURCE = "ane-moe"  # where workers offer it, they alone are used, one call for each unit
RETRIES = 2  # of a call that ends with an error that is not the user's: of shared storage
CONNECT_SECONDS, JOIN_SECONDS, LOOK_SECONDS = 10, 30, 0.5
EARLIER_SECONDS = 1800  # for the shards that an earlier run had begun
ALONE_SECONDS = 120  # without any worker: a nanny starts a killed one anew within seconds
AGAIN = "finished shards are kept: run the same command again"


@dataclass(frozen=True)
class Conditions:
    """What a worker has to find: versions by package, sizes of files, and a file `marker` with this
    text in `out`, to which it can write where it `writes`."""

    versions: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[WeightFile, int], ...] = ()
    out: Path | RemoteFolder | None = None
    marker: str = ""
    text: str = ""
    writes: bool = True

    def objection(self) -> str:
        """What is not so in this process; nothing where all is."""
        ours = installed()
        for name, wanted in self.versions:
            if (found := ours.get(name) or _version(name)) != wanted:
                return f"has {name} {found}, not {wanted}"
        for path, size in self.sizes:
            if (found_size := size_of(path)) is None:
                return f"does not see {path}"
            if found_size != size:
                return f"sees another file as {path}"
            if isinstance(path, Path) and not os.access(path, os.R_OK):
                return f"cannot read {path}"
        if isinstance(self.out, RemoteFolder):
            return self._objection_to_address(self.out)
        return self._objection_to_folder(self.out) if self.out else ""

    def _objection_to_address(self, out: RemoteFolder) -> str:
        if out.read(self.marker) != self.text.encode():
            return f"sees another conversion at {out}"
        if not self.writes:
            return ""
        trial = f"{TEMPORARY}admission-{uuid.uuid4().hex}"
        out.write(trial, "")
        out.remove(trial)
        return ""

    def _objection_to_folder(self, folder: Path) -> str:
        try:
            os.listdir(folder)  # a network file system looks again
            if (folder / self.marker).read_text() != self.text:
                return f"sees another folder as {folder}"
        except OSError:
            return f"does not see {folder}"
        if not self.writes:
            return ""
        try:
            with scratch_folder(folder, "admission"):
                return ""
        except OSError as error:
            return f"cannot write to {folder} ({error.strerror})"


@cache
def installed() -> dict[str, str]:
    """Versions of what decides the bytes of a shard, and a digest of our own source."""
    digest, root = hashlib.sha256(), Path(ane_moe.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {name: _version(name) for name in PACKAGES} | {SOURCE: digest.hexdigest()[:12]}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def open_cluster(where: str, out: Path) -> Iterator["Cluster"]:
    """The workers of the scheduler of that address, or of a cluster that the .toml file of that
    name says how to start, for a conversion into `out`, once they have ended what an earlier run
    left them to do there. Raises UserError."""
    if find_spec("distributed") is None:
        raise UserError(
            "a cluster needs another package", "no distributed", "pip install 'ane-moe[cluster]'"
        )
    with ExitStack() as stack:
        address, patience = where, JOIN_SECONDS
        advice = f"start some with `dask worker {address} --nthreads 1`"
        if where.endswith(".toml"):
            batch = read_batch_system(Path(where))
            address, patience = stack.enter_context(started(batch)), batch.wait_minutes * 60
            advice = batch.advice
        cluster = Cluster(_client(address), address, out, advice)
        stack.callback(cluster.end)
        cluster.begin(patience)
        yield cluster


def _client(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"no scheduler answers at {address}", reason, "start one with `dask scheduler`"
        ) from None


class Cluster(Executor):
    """`Workers` (workers.py) and their pool in one; made by `open_cluster`."""

    def __init__(self, client: Any, address: str, out: Path, advice: str):
        name = hashlib.sha256(str(from_anywhere(out)).encode()).hexdigest()[:12]
        self._client, self._address, self._prefix = client, address, f"ane-moe-{name}"
        self._advice = advice  # where there are no workers
        self._conditions = Conditions(tuple(installed().items()))
        self._resources: dict[str, float] | None = None
        self._slots = 0
        self._calls: dict[Future[Any], Any] = {}  # ours, and dask's
        self._full: dict[str, DiskFull] = {}  # workers without room, by address
        self._change = threading.Condition()
        self._failure: UserError | None = None
        self._ended = threading.Event()

    def begin(self, patience: float) -> None:
        """Wait so many seconds for a first worker, and for calls of an earlier run that nobody
        waits for any more: they would write beside ours. Raises UserError."""
        deadline = time.monotonic() + patience
        while not self._offers(RESOURCE) and not self._offers(None):
            if time.monotonic() > deadline:
                raise UserError(
                    f"the scheduler at {self._address} has no workers",
                    f"none within {patience:g} s",
                    self._advice,
                )
            time.sleep(LOOK_SECONDS)
        self._resources = {RESOURCE: 1} if self._offers(RESOURCE) else None
        self._slots = self._room()
        deadline = time.monotonic() + EARLIER_SECONDS
        while busy := [one for one, at in self._ask(_is_busy, self._prefix).items() if at is True]:
            if time.monotonic() > deadline:
                raise UserError(
                    "workers are still at what an earlier run left them to do",
                    listed(busy),
                    "start them anew, or wait and run the same command again",
                )
            time.sleep(LOOK_SECONDS)
        threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """Leave the cluster as it is, without us."""
        self._ended.set()
        self._client.close(timeout=2)

    def admit(self, needed: Admission) -> None:
        """As of `Workers`; also refuses workers with other versions of what decides the result."""
        sizes = tuple((file, size_of(file) or 0) for file in sorted(needed.files, key=str))
        own = ((name, _version(name)) for name in needed.packages)
        out, marker = needed.out, needed.marker
        there = out.read(marker) if isinstance(out, RemoteFolder) else (out / marker).read_bytes()
        self._conditions = Conditions(
            (*installed().items(), *own), sizes, out, marker, (there or b"").decode(), needed.writes
        )
        for address, found in self._ask(_admission, self._conditions).items():
            if isinstance(found, OSError):  # it died meanwhile
                continue
            if isinstance(found, Exception):
                found = f"cannot run our code ({found})"
            if found:
                raise _refused(address, found)

    def readers(self) -> AbstractContextManager["Cluster"]:
        return nullcontext(self)

    def writers(self) -> AbstractContextManager["Cluster"]:
        return nullcontext(self)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> "Future[Any]":
        """Begin one call, as soon as a worker has room for it."""
        future: Future[Any] = Future()
        with self._change:
            self._change.wait_for(lambda: self._failure or len(self._calls) < max(1, self._slots))
            if self._failure:
                raise self._failure
            self._begin(function, arguments, future)
        return future

    def _begin(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], future: "Future[Any]"
    ) -> None:
        """Send one call, to workers that have room where others have none."""
        name = getattr(arguments[0], "name", function.__name__)
        call = self._client.submit(
            _answer,
            self._conditions,
            function,
            *arguments,
            key=f"{self._prefix}-{name}-{uuid.uuid4().hex}",
            retries=RETRIES,
            resources=self._resources,
            workers=[*(self._workers().keys() - self._full)] if self._full else None,
            allow_other_workers=bool(self._full),  # those that join later
            pure=False,
        )
        self._calls[future] = call

        def again() -> None:
            self._begin(function, arguments, future)

        call.add_done_callback(lambda call: self._done(call, again, name, future))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"worker {address} was left out: {error}" for address, error in self._full.items()
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Begin nothing new. What runs ends by itself, and a next run waits for it."""
        with self._change:
            self._failure = self._failure or UserError("the conversion has ended", do=AGAIN)
            self._change.notify_all()
            self._client.cancel(list(self._calls.values()))

    def _done(self, call: Any, again: Callable[[], None], name: str, future: "Future[Any]") -> None:
        """Hand on what came of a call, or do it `again` where its worker's disk is full: elsewhere,
        as long as there are others."""
        try:
            answer, error = self._came_of(call, name)
            if isinstance(answer, _Full):
                if self._left_out(answer) and future in self._calls:
                    return again()
                error = UserError(f"no worker has room to write to; {answer.error}")
        except Exception as raised:  # of a connection that closes meanwhile
            answer, error = None, raised
        with self._change:
            mine = self._calls.pop(future, None)
            self._change.notify_all()
        if mine is not None:
            future.set_exception(error) if error else future.set_result(answer)

    def _came_of(self, call: Any, name: str) -> tuple[Any, BaseException | None]:
        from distributed.client import FutureCancelledError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        try:
            answer = call.result()
            return answer, answer if isinstance(answer, UserError) else None
        except KilledWorker as killed:
            error = UserError(
                f"{killed.allowed_failures + 1} workers died of {name}, one after the other",
                f"the last was {killed.last_worker.address}",
                f"look at its log, or give workers more memory; {AGAIN}",
            )
            return None, error
        except (FutureCancelledError, CancelledError, CommClosedError):
            return None, self._lost()
        except Exception as raised:
            return None, raised

    def _left_out(self, full: "_Full") -> bool:
        """Ask a worker nothing more; whether there are others."""
        with self._change:
            self._full[full.worker] = full.error
            self._slots = self._room()
            self._change.notify_all()
            return self._slots > 0

    def _watch(self) -> None:
        """Count the workers, and end all calls where there is nobody left to do them."""
        seen = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            try:
                slots = self._room()
            except Exception:  # whatever a closing connection gives
                self._fail(self._lost())
                return
            seen = time.monotonic() if slots else seen
            with self._change:
                self._slots = slots
                self._change.notify_all()
            if time.monotonic() - seen > ALONE_SECONDS:
                gone = f"the scheduler at {self._address} has no workers left"
                self._fail(UserError(gone, do=f"{self._advice}; {AGAIN}"))
                return

    def _fail(self, error: UserError) -> None:
        if self._ended.is_set():
            return
        with self._change:
            self._failure = error
            waiting = list(self._calls)
            self._calls.clear()
            self._change.notify_all()
        for future in waiting:
            future.set_exception(error)

    def _lost(self) -> UserError:
        return UserError(f"the scheduler at {self._address} went away", do=f"start it; {AGAIN}")

    def _offers(self, resource: str | None) -> bool:
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return any(resource is None or resource in worker["resources"] for worker in workers)

    def _workers(self) -> dict[str, int]:
        """How many calls each worker that is used has room for."""
        found = self._client.scheduler_info(n_workers=-1)["workers"]
        if self._resources is None:
            return {address: worker["nthreads"] for address, worker in found.items()}
        return {
            address: int(worker["resources"][RESOURCE])
            for address, worker in found.items()
            if RESOURCE in worker["resources"]
        }

    def _room(self) -> int:
        """How many calls all of them have room for, but those with a full disk."""
        return sum(room for one, room in self._workers().items() if one not in self._full)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What each worker that is used answers at once; an exception where it could not."""
        workers = list(self._workers())
        return dict(self._client.run(function, *arguments, workers=workers, on_error="return"))


def _admission(conditions: Conditions) -> str:
    """In a worker that begins: what it lacks."""
    forget([file for file, _ in conditions.sizes])
    return _objection(conditions)


def _objection(conditions: Conditions) -> str:
    """In a worker: what it lacks, looked for until it once lacked nothing."""
    if conditions in _met:
        return ""
    try:
        found = conditions.objection()
    except UserError as error:  # of an address
        return f"says: {error}"
    if not found:
        _met.add(conditions)
    return found


_met: set[Conditions] = set()  # of this process


def _is_busy(prefix: str, dask_worker: Any) -> bool:
    """Whether this worker runs a call of ours, also one that was called off."""
    return any(str(task.key).startswith(prefix) for task in dask_worker.state.executing)


@dataclass(frozen=True)
class _Full:
    """What a worker answers that had no room to write."""

    worker: str
    error: DiskFull


def _answer(conditions: Conditions, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: the result, or the UserError, which no other worker would mend unless it is of
    a full disk. One that joined later has been asked nothing yet."""
    from distributed import get_worker

    if objection := _objection(conditions):
        return _refused(get_worker().address, objection)
    try:
        return function(*arguments)
    except DiskFull as error:
        return _Full(get_worker().address, error)
    except UserError as error:
        return error


def _refused(address: str, objection: str) -> UserError:
    return UserError(
        f"worker {address} {objection}",
        do="give it the same packages and folders as this machine, or close it",
    )
