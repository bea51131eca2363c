"""The cache of compiled Core ML models (`.mlmodelc`): content-addressed, size-limited, shared by
processes.

    FOLDER/settings.json              the size limit, when one was chosen
    FOLDER/models/KEY/entry.json      what is inside, written last; its mtime is the time of last
    use FOLDER/models/KEY/model.mlmodelc  the compiled model
    FOLDER/models/KEY/good/           one empty file per (function, compute units) that loaded and
    predicted
    FOLDER/hashes/                    content hashes by path, size and mtime, so that a package is
    read once
    FOLDER/leases/                    one locked file per process: the keys it has loaded, which
    nobody evicts
    FOLDER/locks/                     held while a model is compiled, or while the list of entries
    changes
    FOLDER/work/                      half-made and half-deleted models; never read

An entry appears by one rename and disappears by one rename, so a reader sees all of it or nothing.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError

DEFAULT_FOLDER = Path("~/Library/Caches/ane-moe")
DEFAULT_LIMIT_BYTES = 32 * 10**9
MODEL_NAME = "model.mlmodelc"  # Core ML tells a compiled model by this suffix
FORMAT = 1
SETTLED_SECONDS = 2.0  # a file changed more recently than this may change again within its mtime
STALE_WORK_SECONDS = 24 * 3600.0
PLANS = "plans"  # compute plans kept beside the models they are of


@dataclass(frozen=True)
class Entry:
    """One compiled model: `name` is the package it came from, `last_used` seconds since the
    epoch."""

    key: str
    name: str
    os_build: str
    size_bytes: int
    last_used: float
    in_use: bool
    good: tuple[str, ...]


def current_os_build() -> str:
    """The macOS build (`24F74`), which decides what a compiled model is good for.

    Raises UserError when `sw_vers` is missing or fails.
    """
    try:
        done = subprocess.run(
            ["sw_vers", "-buildVersion"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            "compiled models belong to a macOS build, and `sw_vers` names none",
            str(error),
            "use --runtime reference off macOS",
        ) from None
    return done.stdout.strip()


class ModelCache:
    """A cache in `folder`. `limit_bytes` overrides the limit stored there; `os_build` the one
    `sw_vers` reports."""

    def __init__(
        self,
        folder: Path | None = None,
        limit_bytes: int | None = None,
        os_build: str | None = None,
    ):
        self.folder = (folder or DEFAULT_FOLDER).expanduser()
        self.os_build = os_build or current_os_build()
        self._limit_bytes = limit_bytes
        try:
            for part in ("models", "hashes", "leases", "locks", "work"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            with (
                self._exclusive()
            ):  # a lease nobody has locked yet would be taken for a dead process's
                self._lease = open(self.folder / "leases" / uuid.uuid4().hex, "w")  # noqa: SIM115
                fcntl.flock(self._lease, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"the cache folder {self.folder} cannot be used",
                str(error),
                "give a folder that can be written to",
            ) from error

    # -- keys
    # ----------------------------------------------------------------------------------------------

    def key(self, package: Path) -> str:
        """Hash of every file of `package` (names and bytes) and of the OS build; 40 hex digits."""
        files = sorted(path for path in package.rglob("*") if path.is_file())
        stats = [[path.relative_to(package).as_posix(), *_fingerprint(path)] for path in files]
        memo = (
            self.folder
            / "hashes"
            / f"{hashlib.sha256(os.fsencode(package.resolve())).hexdigest()[:40]}.json"
        )
        known = _read_json(memo)
        content = (
            known.get("content") if known is not None and known.get("files") == stats else None
        )
        if not isinstance(content, str):
            content = _content_hash(files, stats)
            if all(time.time() - path.stat().st_mtime > SETTLED_SECONDS for path in files):
                _write_json(memo, {"files": stats, "content": content})
        return hashlib.sha256(f"{FORMAT}\n{self.os_build}\n{content}".encode()).hexdigest()[:40]

    # -- reading and filling
    # --------------------------------------------------------------------------------------

    def find(self, key: str) -> Path | None:
        """The compiled model under `key`, leased to this process until it ends; None when absent or
        damaged."""
        with self._exclusive():
            if self._about(key) is None:
                self._discard(key)
                return None
            self._lease.write(key + "\n")
            self._lease.flush()
            os.utime(self._entry(key) / "entry.json")
            return self._entry(key) / MODEL_NAME

    def get(self, package: Path, key: str, compile_to: Callable[[Path], None]) -> Path:
        """The compiled model of `package`, made by `compile_to(destination)` when the cache has
        none.

        Only one process compiles a key at a time; the others wait for it and take the result.
        """
        with self._locked(key[:2]):  # two keys may share a lock: they wait for each other, no more
            found = self.find(key)
            if found is not None:
                return found
            self._fill(package, key, compile_to)
            found = self.find(key)
        if found is None:
            raise UserError(
                f"the compiled model of {package} vanished from {self.folder}",
                do="do not clear the cache while models are being loaded",
            )
        self.trim()
        return found

    def _fill(self, package: Path, key: str, compile_to: Callable[[Path], None]) -> None:
        work = self.folder / "work" / uuid.uuid4().hex
        work.mkdir()
        try:
            compile_to(work / MODEL_NAME)
            (work / "good").mkdir()
            files = _sizes(work / MODEL_NAME)
            _write_json(
                work / "entry.json",
                {
                    "format": FORMAT,
                    "name": package.name,
                    "os_build": self.os_build,
                    "files": files,
                    "size_bytes": sum(files.values()),
                },
            )
            with self._exclusive():
                os.rename(work, self._entry(key))
        except OSError as error:
            raise UserError(
                f"the compiled model of {package} could not be stored in {self.folder}",
                str(error),
                "free some disk space (`ane-moe cache --clear`)",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Drop one entry, so that the next `get` compiles again."""
        with self._exclusive():
            self._discard(key)

    # -- what is known of an entry
    # --------------------------------------------------------------------------------

    def is_good(self, key: str, use: str) -> bool:
        """Whether `use` (a function and compute units) is known to load and predict."""
        return (self._entry(key) / "good" / _file_name(use)).is_file()

    def mark_good(self, key: str, use: str) -> None:
        """Remember that `use` of this entry loaded and predicted."""
        with suppress(FileNotFoundError):  # the entry is gone, and what was known of it with it
            (self._entry(key) / "good" / _file_name(use)).touch()

    # -- size
    # ----------------------------------------------------------------------------------------------

    @property
    def limit_bytes(self) -> int:
        """The size limit: the constructor's, else the stored one, else the default."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        settings = _read_json(self.folder / "settings.json") or {}
        limit = settings.get("limit_bytes")
        return limit if isinstance(limit, int) else DEFAULT_LIMIT_BYTES

    def set_limit(self, limit_bytes: int) -> list[Entry]:
        """Store a size limit and trim to it. Returns what was removed."""
        self._limit_bytes = None
        _write_json(self.folder / "settings.json", {"limit_bytes": limit_bytes})
        return self.trim()

    def entries(self) -> list[Entry]:
        """All entries, most recently used first."""
        with self._exclusive():
            return self._entries()

    def trim(self) -> list[Entry]:
        """Remove entries of other OS builds, then the least recently used, until the limit is kept.

        Entries a living process has loaded stay, even over the limit. Returns what was removed.
        """
        with self._exclusive():
            entries = self._entries()
            removed = [
                entry for entry in entries if entry.os_build != self.os_build and not entry.in_use
            ]
            kept = [entry for entry in entries if entry not in removed]
            total = sum(entry.size_bytes for entry in kept)
            for entry in reversed(kept):
                if total > self.limit_bytes and not entry.in_use:
                    removed.append(entry)
                    total -= entry.size_bytes
            self._remove(removed)
            return removed

    def clear(self) -> list[Entry]:
        """Remove every entry that no living process has loaded, and all kept compute plans. Returns
        the entries."""
        with self._exclusive():
            removed = [entry for entry in self._entries() if not entry.in_use]
            self._remove(removed)
            shutil.rmtree(self.folder / PLANS, ignore_errors=True)
            return removed

    def _remove(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._discard(entry.key)
        for leftover in (self.folder / "work").iterdir():
            if time.time() - leftover.stat().st_mtime > STALE_WORK_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)

    def _entries(self) -> list[Entry]:
        in_use = self._keys_in_use()
        found = []
        for folder in list((self.folder / "models").iterdir()):
            about = self._about(folder.name)
            if about is None:
                self._discard(folder.name)
                continue
            found.append(
                Entry(
                    folder.name,
                    about["name"],
                    about["os_build"],
                    about["size_bytes"],
                    (folder / "entry.json").stat().st_mtime,
                    folder.name in in_use,
                    tuple(sorted(path.name for path in (folder / "good").iterdir())),
                )
            )
        return sorted(found, key=lambda entry: -entry.last_used)

    # -- files
    # ----------------------------------------------------------------------------------------------

    def _entry(self, key: str) -> Path:
        return self.folder / "models" / key

    def _about(self, key: str) -> dict[str, Any] | None:
        """entry.json, if every file it names is there with its size; other damage shows when Core
        ML loads it."""
        entry = self._entry(key)
        about = _read_json(entry / "entry.json")
        whole = (
            about is not None
            and about.keys() == {"format", "name", "os_build", "files", "size_bytes"}
            and about["files"] == _sizes(entry / MODEL_NAME)
            and (entry / "good").is_dir()
        )
        return about if whole else None

    def _discard(self, key: str) -> None:
        grave = self.folder / "work" / uuid.uuid4().hex
        try:
            os.rename(self._entry(key), grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def _keys_in_use(self) -> set[str]:
        """Keys in the lease files whose writer still lives, i.e. still holds the lock; other leases
        are removed."""
        keys: set[str] = set()
        for path in list((self.folder / "leases").iterdir()):
            with open(path) as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    keys.update(lease.read().split())
                else:
                    path.unlink()
        return keys

    def _exclusive(self) -> AbstractContextManager[None]:
        return self._locked("cache")

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / "locks" / name, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _file_name(use: str) -> str:
    """A function name may hold any character; a file name may not."""
    return (
        use
        if use.replace("_", "").replace("-", "").isalnum()
        else hashlib.sha256(use.encode()).hexdigest()[:40]
    )


def _fingerprint(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _content_hash(files: list[Path], stats: list[list[Any]]) -> str:
    total = hashlib.sha256()
    for path, (name, *_) in zip(files, stats, strict=True):
        with open(path, "rb") as stream:
            total.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of the cache; None when it is missing or damaged, which the caller
    treats alike."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(json.dumps(data))
    os.replace(temporary, path)
