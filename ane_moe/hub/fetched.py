"""Conversions at an address: what the manifest names and nothing else, checked by its digests
before anything is loaded."""

import hashlib
from pathlib import Path

from ane_moe.addresses import ADDRESS_FILE, address, kept_as
from ane_moe.errors import UserError
from ane_moe.fetch_lock import one_run
from ane_moe.files import disk_error, write_text
from ane_moe.hub.digests import check_digests_once, note_checked
from ane_moe.hub.pulled import PARTIAL, take
from ane_moe.manifest import FILE_NAME, read_manifest
from ane_moe.origins import note_origin, origin_of
from ane_moe.progress import Progress, silent
from ane_moe.remote_folder import RemoteFolder
from ane_moe.user_cache import user_cache


def fetched(url: str, progress: Progress = silent) -> Path:
    """The conversion at `url`, as it is there now, in a folder of our own cache. Raises UserError
    where there is none, and where a file is not what the manifest names."""
    there = RemoteFolder(url)
    text = there.read(FILE_NAME)
    if text is None:
        raise UserError(
            f"{url} is not a finished conversion", f"no {FILE_NAME}", "run `ane-moe convert` again"
        )
    of_address = _root() / kept_as(url)
    folder = of_address / hashlib.sha256(text).hexdigest()[:32]
    with one_run(of_address, progress):
        if (folder / FILE_NAME).is_file():
            check_digests_once(folder, read_manifest(folder), progress)
        else:
            _fetch(there, text, folder, progress)
    note_origin(folder, url)
    return folder


def _fetch(there: RemoteFolder, text: bytes, folder: Path, progress: Progress) -> None:
    partial = folder / PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_text(folder.parent / ADDRESS_FILE, there.url)
        (partial / FILE_NAME).write_bytes(text)
    except OSError as error:
        raise disk_error(error, folder) from None
    manifest = read_manifest(partial)
    there.require_room(manifest.files, partial)

    def download(into: Path) -> None:
        for done, (name, digest) in enumerate(sorted(manifest.files.items())):
            progress(f"fetching {name}", done, len(manifest.files))
            there.fetch_checked({name: digest}, into)

    take(download, manifest, folder, progress)
    note_checked(folder, manifest)


def address_of(folder: Path) -> RemoteFolder | None:
    """Where a folder was `fetched` from by this process; None for others."""
    url = address(origin_of(folder) or "")
    return RemoteFolder(url) if url else None


def _root() -> Path:
    return user_cache() / "conversions" / "addresses"
