"""Conversions from the Hugging Face Hub: what the manifest names and nothing else, checked by its
digests before anything is loaded."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ane_moe.addresses import HUB
from ane_moe.checkpoints.hub import HubName
from ane_moe.errors import UserError
from ane_moe.fetch_lock import one_run
from ane_moe.files import TEMPORARY
from ane_moe.hub.asking import asking, repository
from ane_moe.hub.digests import check_digests, check_digests_once, note_checked
from ane_moe.manifest import FILE_NAME, Manifest, read_manifest
from ane_moe.origins import note_origin
from ane_moe.progress import Progress, silent
from ane_moe.user_cache import user_cache

CARD = "README.md"
DO = "check its name and the network; private ones need `hf auth login`"
PARTIAL = f"{TEMPORARY}pull"  # inside the folder, where an interrupted download goes on


def pulled(text: str, progress: Progress = silent) -> Path:
    """A conversion on the Hub, in a folder of our own cache: what `hf://OWNER/NAME[@REVISION]` in
    the place of a folder stands for. (The Hub's cache is made of links, and a package with links
    that lead out of it is not opened.)

    Raises UserError where there is none, and where a file is not what the manifest names.
    """
    name = repository(text)
    with _asking(name):
        commit, manifest = _manifest(name)
    folder = user_cache() / "conversions" / commit.place
    with one_run(folder, progress):
        if (folder / FILE_NAME).is_file():
            check_digests_once(folder, manifest, progress)
        else:
            _fetch(commit, manifest, folder, progress)
            note_checked(folder, manifest)
    note_origin(folder, f"{HUB}://{commit}")
    return folder


def pull(text: str, folder: Path, progress: Progress = silent) -> Manifest:
    """Fetch a conversion into `folder`, new or empty; one that was interrupted goes on. The
    manifest is there when everything else is, and has been checked.

    Raises UserError as `pulled`, and where the folder holds something or cannot be written.
    """
    name = repository(text)
    with one_run(folder, progress):
        others = [one for one in folder.iterdir() if one.name != PARTIAL] if folder.is_dir() else []
        if others or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder} holds something else", do="name a new or empty folder")
        with _asking(name):
            commit, manifest = _manifest(name)
        _fetch(commit, manifest, folder, progress)
    return manifest


def _asking(name: HubName) -> AbstractContextManager[None]:
    return asking(f"{name} cannot be fetched from the Hugging Face Hub", DO)


def _fetch(commit: HubName, manifest: Manifest, folder: Path, progress: Progress) -> None:
    def download(into: Path) -> None:
        with _asking(commit):
            into.mkdir(parents=True, exist_ok=True)
            _snapshot(commit, manifest, into)

    take(download, manifest, folder, progress)


def take(
    download: Callable[[Path], None], manifest: Manifest, folder: Path, progress: Progress
) -> None:
    """All files below a temporary name, checked, then each to its place in `folder`, the manifest
    last. Raises UserError."""
    partial = folder / PARTIAL
    download(partial)
    check_digests(partial, manifest, progress)
    try:
        for file in (*manifest.files, CARD, FILE_NAME):
            if (partial / file).is_file():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / file, folder / file)
        shutil.rmtree(partial)
    except OSError as error:
        raise UserError(f"{folder} cannot be written", str(error.strerror)) from None


def _manifest(name: HubName) -> tuple[HubName, Manifest]:
    """The commit that is meant, and its manifest, whose paths have been checked."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hub.hf_hub_download(name.repository, FILE_NAME, revision=name.revision))
    except EntryNotFoundError:
        found = f"no {FILE_NAME} in it"
        do = "a checkpoint is named without hf://, and converted first"
        raise UserError(f"{name} is no conversion", found, do) from None
    return HubName(name.repository, path.parent.name), read_manifest(path.parent)


def _snapshot(commit: HubName, manifest: Manifest, into: Path) -> None:
    import huggingface_hub as hub

    files = [FILE_NAME, CARD, *manifest.files]
    hub.snapshot_download(
        commit.repository,
        revision=commit.revision,
        allow_patterns=[_literal(file) for file in files],
        local_dir=into,
    )


def _literal(file: str) -> str:
    """A pattern, as in a shell, of one file."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in file)
