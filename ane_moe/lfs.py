"""Git LFS pointers: the small text files that stand for large ones in a clone without git-lfs.

A pointer's first line is `version https://git-lfs.github.com/spec/v1`, and it has fewer than 1024
bytes (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
"""

from pathlib import Path

MAX_POINTER_BYTES = 1024
FETCH = "run `git lfs pull` where it was cloned, or download the file itself"

_FIRST_BYTES = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Whether `path` is a Git LFS pointer instead of the file itself.

    False too for what cannot be read as a plain file: whoever reads it says why.
    """
    try:
        if not path.is_file() or path.stat().st_size >= MAX_POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_FIRST_BYTES)) == _FIRST_BYTES
    except (OSError, ValueError):
        return False
