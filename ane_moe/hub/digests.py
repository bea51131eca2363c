"""Whether the files of a conversion are those that its manifest names."""

import hashlib
from pathlib import Path

from ane_moe.errors import UserError
from ane_moe.files import sha256, write_text
from ane_moe.manifest import FILE_NAME, Manifest
from ane_moe.progress import Progress, silent
from ane_moe.user_cache import user_cache


def check_digests(folder: Path, manifest: Manifest, progress: Progress = silent) -> None:
    """Raise UserError where a file is missing, or has another sha256 than the manifest says."""
    for done, (name, digest) in enumerate(sorted(manifest.files.items())):
        progress("checking files", done, len(manifest.files))
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks a file that its manifest names", name)
        if (found := sha256(path)) != digest:
            raise UserError(
                f"{path} is not the file that the manifest names",
                f"sha256 {found[:12]}, not {digest[:12]}",
                "it was damaged or changed; get it again",
            )


def check_digests_once(folder: Path, manifest: Manifest, progress: Progress = silent) -> None:
    """The same; of files that have not been touched since they were checked nothing is read."""
    if not _mark(folder, manifest).is_file():
        check_digests(folder, manifest, progress)
        note_checked(folder, manifest)


def note_checked(folder: Path, manifest: Manifest) -> None:
    """Keep in mind that the files, as they lie there now, have been checked."""
    mark = _mark(folder, manifest)
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_text(mark, f"{folder}\n")


def _mark(folder: Path, manifest: Manifest) -> Path:
    return user_cache() / "checked" / _state(folder, manifest)


def _state(folder: Path, manifest: Manifest) -> str:
    """A digest of the manifest, and of place, inode, size and times of change of its files."""
    facts = [str(folder.absolute()), sha256(folder / FILE_NAME)]
    for name in sorted(manifest.files):
        path = folder / name
        found = path.stat() if path.is_file() else None
        inode = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if found else ()
        facts.append(f"{name} {inode}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
