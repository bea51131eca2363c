"""The built-in demo checkpoints: a tiny trained `qwen3_moe` model of Python source code, and a tiny
trained `openai_privacy_filter`."""

import os
import shutil
import tempfile
from pathlib import Path

from ane_moe.errors import UserError


def demo_checkpoint() -> Path:
    """Return the folder of the packaged checkpoint (read-only: copy it to change it)."""
    return Path(__file__).parent / "checkpoint"


def privacy_checkpoint() -> Path:
    """Return the folder of the packaged privacy filter (read-only)."""
    return Path(__file__).parent / "privacy"


BUILT_IN = {"demo": demo_checkpoint, "demo-privacy": privacy_checkpoint}


def built_in(checkpoint: Path) -> Path:
    """The packaged checkpoint that `demo` or `demo-privacy` names; any other path as it is."""
    return BUILT_IN.get(str(checkpoint), lambda: checkpoint)()


def copy_demo(dest: Path) -> Path:
    """Copy the packaged checkpoint into `dest`, a new or empty folder, and return `dest`.

    Raises UserError if `dest` holds something or cannot be written; nothing half-copied is left.
    """
    try:
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise UserError(
                "the demo model needs a new or empty folder",
                found=f"{dest} {'holds files' if dest.is_dir() else 'is a file'}",
                do="name another folder",
            )
        dest.mkdir(parents=True, exist_ok=True)
        # The copies are made inside `dest`, so that the final renames stay on one disk and need no
        # space.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=dest) as partial:
            sources = sorted(demo_checkpoint().iterdir())
            for source in sources:
                shutil.copyfile(source, Path(partial) / source.name)
            for source in sources:
                os.replace(Path(partial) / source.name, dest / source.name)
    except OSError as error:
        raise UserError(
            "cannot write the demo model", found=str(error), do="name another folder"
        ) from error
    return dest
