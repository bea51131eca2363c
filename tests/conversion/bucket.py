"""A store of objects in a folder, for fsspec by `bucket://`, whoever of the machine opens it: what
is put there is there whole. What befalls it is told in a file."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from ane_moe.files import write_text

VARIABLE = "ANE_MOE_BUCKET"
UNSEEN = "ANE_MOE_UNSEEN"
PROTOCOL = "bucket"
REFUSALS = {
    "denied": PermissionError("Access Denied"),
    "full": OSError(errno.ENOSPC, "No space left on the store"),
    "broken": ConnectionResetError("the line broke"),
}


def begin(folder: Path) -> None:
    """From now on `bucket://` is this folder, here and in processes that are begun."""
    os.environ[VARIABLE] = str(folder)
    fsspec.register_implementation(PROTOCOL, Bucket, clobber=True)
    befall()


def befall(what: str = "", named: str = "", after: int = 0) -> None:
    """Files whose names hold `named` are refused, after so many."""
    facts = {"what": what, "named": named, "after": after}
    write_text(_root() / ".facts", json.dumps(facts))


def dask_setup(worker: Any) -> None:
    """In a worker: it has the store, and opens no file of the folder UNSEEN, of another machine."""
    fsspec.register_implementation(PROTOCOL, Bucket, clobber=True)
    unseen = os.environ[UNSEEN]

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(unseen):
            raise PermissionError(arguments[0])

    sys.addaudithook(heard)


def _root() -> Path:
    return Path(os.environ[VARIABLE])


class Bucket(AbstractFileSystem):
    protocol = PROTOCOL
    cachable = False

    def _path(self, path: str) -> Path:
        return _root() / self._strip_protocol(path).lstrip("/")

    def _told(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            raise FileNotFoundError(str(path))
        name, kind = path.relative_to(_root()).as_posix(), "file" if path.is_file() else "directory"
        return {"name": name, "size": path.stat().st_size, "type": kind}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._told(self._path(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        inside = self._path(path)
        if not inside.exists():
            raise FileNotFoundError(path)
        found = [inside] if inside.is_file() else sorted(inside.iterdir())
        entries = [self._told(one) for one in found if not one.name.startswith(".put-")]
        return entries if detail else [entry["name"] for entry in entries]

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self._refuse(rpath)
        target = self._path(rpath)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".put-{os.getpid()}-{target.name}")
        shutil.copyfile(lpath, partial)
        os.replace(partial, target)

    def rm_file(self, path: str) -> None:
        self._path(path).unlink()

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "rb"
        return self._path(path).open("rb")

    def _refuse(self, name: str) -> None:
        facts = json.loads((_root() / ".facts").read_text())
        if facts["what"] and facts["named"] in name:
            if facts["after"] == 0:
                raise REFUSALS[facts["what"]]
            write_text(_root() / ".facts", json.dumps(facts | {"after": facts["after"] - 1}))
