"""The folders of the user's cache that hold what was fetched: conversions of addresses and of the
Hub, and of checkpoints the headers, or some layers. They stay until they are removed."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ane_moe.addresses import ADDRESS_FILE, AT_COMMIT, HUB, named
from ane_moe.checkpoints.hub import FILE, NAME
from ane_moe.errors import UserError
from ane_moe.fetch_lock import if_free, lock_of
from ane_moe.files import TEMPORARY
from ane_moe.hub.pulled import PARTIAL
from ane_moe.manifest import FILE_NAME
from ane_moe.wording import listed

# Below OWNER--NAME/COMMIT of the Hub, whose own cache may lie beside ours, or of an address, by
# what it is `kept_as`.
COMMIT = r"(?!(?:models|datasets|spaces)--)[^/]+?--[^/]+/[0-9a-f]{40}"
ADDRESS = "[0-9a-f]{16}"
GGUF_FILE = re.compile(r"/[^/]+\.gguf\Z")
CHECKED = "checked"  # marks of files that need not be read again (hub/digests.py)
UNTOLD = "unknown"
BLOCK = 512  # bytes, of what the system counts in


@dataclass(frozen=True)
class Kind:
    """Folders that are fetched: where to look, what their path in the cache is, what they hold (as
    the name says, where it is not told), and by which files, one of them, they are known."""

    pattern: str
    path: str
    holds: str
    marks: tuple[str, ...]


KINDS = (
    Kind(
        "conversions/addresses/*", f"conversions/addresses/{ADDRESS}", "conversion", (ADDRESS_FILE,)
    ),
    Kind("conversions/*--*/*", f"conversions/{COMMIT}", "conversion", (FILE_NAME, PARTIAL)),
    Kind("remote/*", f"remote/{ADDRESS}", "headers", (ADDRESS_FILE,)),
    Kind("hub/*--*/*/*", rf"hub/{COMMIT}/(?:headers|layers[\d_]+)", "", ()),
)


@dataclass(frozen=True)
class FetchedFolder:
    """What `folder` holds, and of which `origin`; bytes are those of the disk, since files have
    holes, `last_used` is in seconds since the epoch."""

    origin: str
    holds: str
    folder: Path
    size_bytes: int
    last_used: float


def fetched_folders(cache: Path) -> list[FetchedFolder]:
    """All of them in a cache, the largest first. Links are none, nor is what only lies in their
    place."""
    found = []
    for kind in KINDS:
        for folder in cache.glob(kind.pattern):
            if _is_inside(cache, folder) and _is_ours(folder, kind, cache):
                with suppress(FileNotFoundError):  # another run removes it
                    found.append(_described(folder, kind.holds, cache))
    return sorted(found, key=lambda one: (-one.size_bytes, one.origin, one.holds))


def of_origin(text: str, cache: Path) -> list[FetchedFolder]:
    """Those of an address, or of a model on the Hub, by the names that other commands know: of a
    GGUF file the folder that it is kept in, of a branch the commit that it was when the Hub's own
    cache saw it last. Raises UserError where there are none."""
    kept = fetched_folders(cache)
    origins = {one.origin for one in kept}
    url = named(text).rstrip("/")
    on_hub = FILE.fullmatch(url) or NAME.fullmatch(url)
    asked = on_hub.groupdict() if on_hub else {}
    of_model = _of_model(origins, asked.get("repository"))
    meant = origins & {url, GGUF_FILE.sub("", url)}
    meant |= {origin for origin, at in of_model.items() if _is_asked(at, **asked)}
    if not meant:
        others = f"{len(kept)} others" if kept else "nothing at all"
        found = listed(of_model) if of_model else others
        raise UserError(f"nothing of {text} is kept", found, "`ane-moe cache` lists what is")
    return [one for one in kept if one.origin in meant]


def remove(kept: Iterable[FetchedFolder], cache: Path) -> list[FetchedFolder]:
    """Delete folders, each whole or not at all, but those that a run fetches into or uses. Returns
    which were deleted, by us or by another run meanwhile. Raises UserError where the system does
    not let them go."""
    removed = []
    for one in kept:
        with if_free(one.folder, cache) as is_free:
            if is_free and _is_inside(cache, one.folder):
                _delete(one.folder)
                _forget_checks(one.folder, cache / CHECKED)
                removed.append(one)
            elif not os.path.lexists(one.folder):
                removed.append(one)  # another run was faster
    return removed


def _of_model(origins: Iterable[str], repository: str | None) -> dict[str, re.Match[str]]:
    found = ((origin, AT_COMMIT.fullmatch(origin)) for origin in origins)
    return {origin: at for origin, at in found if at and at["hub"] == repository}


def _is_asked(
    at: re.Match[str],
    repository: str,
    revision: str | None,
    file: str | None = None,
    kind: str | None = None,
) -> bool:
    """Whether an origin of the model is at the revision, and has the file in it, that are named.
    All kinds of a model are kept together."""
    if file is not None and file.rpartition("/")[0] != (at["file"] or ""):
        return False
    commit = at["revision"]
    return revision in (None, commit) or commit == _commit(repository, str(revision))


def _commit(repository: str, branch: str) -> str:
    """What the Hub's own cache knows a branch by; nothing for those that it never saw."""
    from huggingface_hub import constants

    owned = f"models--{repository.replace('/', '--')}"
    path = Path(constants.HF_HUB_CACHE, owned, "refs", branch)
    with suppress(OSError, ValueError):
        return path.read_text().strip()
    return ""


def _is_ours(folder: Path, kind: Kind, cache: Path) -> bool:
    """Whether a folder is called as we call them, and is known by a file, unless it was set aside
    to be removed."""
    name = folder.name.removeprefix(TEMPORARY)
    path = folder.relative_to(cache).with_name(name).as_posix() if name else ""
    known = not kind.marks or any((folder / mark).exists() for mark in kind.marks)
    return bool(re.fullmatch(kind.path, path)) and (known or name != folder.name)


def _is_inside(cache: Path, folder: Path) -> bool:
    """Whether it is a folder of the cache itself: nothing on the way to it is a link."""
    below = folder.relative_to(cache).parts
    way = [cache.joinpath(*below[:depth]) for depth in range(1, len(below) + 1)]
    return folder.is_dir() and not any(path.is_symlink() for path in way)


def _described(folder: Path, holds: str, cache: Path) -> FetchedFolder:
    lock = lock_of(folder, cache)
    used = (lock if lock.exists() else folder).stat().st_mtime
    held = holds or folder.name.removeprefix(TEMPORARY).replace("_", " ")
    return FetchedFolder(_origin(folder, cache), held, folder, _size(folder), used)


def _origin(folder: Path, cache: Path) -> str:
    record = folder / ADDRESS_FILE
    if record.is_file():
        return record.read_text(errors="replace")
    _, owned, *rest = folder.relative_to(cache).parts
    if "--" not in owned or not rest:  # a removal was killed
        return UNTOLD
    commit = rest[0].removeprefix(TEMPORARY)  # of a removal that was killed
    return f"{HUB}://{owned.replace('--', '/', 1)}@{commit}"


def _size(folder: Path) -> int:
    size = 0
    for inside, _, names in os.walk(folder):  # which follows no links
        for path in (Path(inside) / name for name in names):
            with suppress(FileNotFoundError):  # written under another name
                size += path.lstat().st_blocks * BLOCK
    return size


def _delete(folder: Path) -> None:
    """It loses its name first: half of a folder is taken for none that is finished."""
    aside = folder.with_name(f"{TEMPORARY}{folder.name.removeprefix(TEMPORARY)}")
    try:
        if aside != folder:
            shutil.rmtree(aside, ignore_errors=True)  # of a removal that was killed
            os.replace(folder, aside)
        shutil.rmtree(aside)
    except OSError as error:
        if not (folder.exists() or aside.exists()):  # another run, or a person, was faster
            return
        raise UserError(f"{folder} cannot be removed", str(error.strerror)) from None


def _forget_checks(folder: Path, marks: Path) -> None:
    for mark in marks.glob("*"):
        with suppress(OSError, ValueError):  # another run's, half-written
            if Path(mark.read_text().strip()).is_relative_to(folder):
                mark.unlink()
