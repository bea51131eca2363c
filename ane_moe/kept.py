"""Results of the steps of a long job, each written whole when its step is done, so that a run that
is broken off loses no more than the step it was in.

They lie in a folder of a content key: of everything that decides them. Its name is a temporary one
(files.py), so that a conversion that holds it is swept by the next `convert`, and is no other for
it.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ane_moe.files import TEMPORARY, replaced, temporary_folder

LOCK = "lock"


class Kept:
    """Results in `folder`, by the name of the step. What a step gave is a dictionary of tensors,
    numbers, texts, and lists, tuples and dictionaries of these. `reused` counts the steps whose
    results were there when they were asked for the first time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._saved: set[str] = set()
        self._reused: set[str] = set()

    @property
    def reused(self) -> int:
        return len(self._reused)

    def has(self, step: str) -> bool:
        """Whether a step was done before."""
        return (self.folder / step).is_file()

    def save(self, step: str, result: dict[str, Any]) -> None:
        """Write what a step gave."""
        import torch

        with replaced(self.folder / step) as temporary, temporary.open("wb") as file:
            torch.save(result, file)
        self._saved.add(step)

    def load(self, step: str) -> dict[str, Any] | None:
        """What a step gave, its tensors mapped into memory; None where it was not done, or where
        the file is damaged."""
        import torch

        try:
            result = torch.load(self.folder / step, mmap=True, weights_only=True)
        except Exception:  # pickles that are cut or forged end in errors of many kinds
            return None
        if not isinstance(result, dict):
            return None
        if step not in self._saved:
            self._reused.add(step)
        return result


def content_key(facts: Iterable[object]) -> str:
    """sha256 (hex) over the text of `facts`, in their order."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()


@contextmanager
def kept_beside(folder: Path, name: str, key: str, *, fresh: bool) -> Iterator[Kept]:
    """What an earlier run of the same job left in `folder` (nothing if `fresh`), to go on with.

    It is removed when the block is left without an error, and stays otherwise. Where `folder`
    cannot be written, or another process is at the same job, nothing outlasts the block.
    """
    with ExitStack() as stack:
        own = folder / f"{TEMPORARY}{name}-{key[:32]}"
        try:
            own.mkdir(exist_ok=True)
            lock = stack.enter_context((own / LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield Kept(stack.enter_context(temporary_folder()))
            return
        if fresh:
            for path in own.iterdir():
                if path.name != LOCK:
                    path.unlink()
        yield Kept(own)
        shutil.rmtree(own, ignore_errors=True)
