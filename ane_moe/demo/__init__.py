"""The built-in demo checkpoints, all small and really trained: `language`, a `qwen3_moe` of Python
source code, and `privacy`, an `openai_privacy_filter`; and small language models of research
systems."""

import os
import shutil
import tempfile
from pathlib import Path

from ane_moe.errors import UserError

HERE = Path(__file__).parent
LANGUAGE = "language"
# Where the checkpoint of each demo lies.
DEMOS = {
    LANGUAGE: "checkpoint",
    "privacy": "privacy",
    "two-bit": "two-bit",
    "pt-moe": "pt-moe",
    "omni-moe": "omni-moe",
    "afm": "afm",
}


def find_demo(name: str) -> Path:
    """Return the folder of a packaged checkpoint (read-only: copy it to change it). Raises
    UserError where there is none of that name."""
    if name not in DEMOS:
        known = ", ".join(DEMOS)
        raise UserError("there is no such demo", repr(name), f"name one of these: {known}")
    return HERE / DEMOS[name]


def demo_checkpoint() -> Path:
    """The packaged language model."""
    return find_demo(LANGUAGE)


def privacy_checkpoint() -> Path:
    """The packaged privacy filter."""
    return find_demo("privacy")


# What stands for a packaged checkpoint where a path is asked for, and its name.
BUILT_IN = {f"demo-{name}": name for name in DEMOS} | {"demo": LANGUAGE}


def built_in(checkpoint: Path) -> Path:
    """The packaged checkpoint that `demo` or, say, `demo-privacy` names; any other path as it
    is."""
    name = BUILT_IN.get(str(checkpoint))
    return find_demo(name) if name else checkpoint


def copy_demo(dest: Path, name: str = LANGUAGE) -> Path:
    """Copy a packaged checkpoint into `dest`, a new or empty folder, and return `dest`.

    Raises UserError if there is no such demo, or if `dest` holds something or cannot be written;
    nothing half-copied is left.
    """
    demo = find_demo(name)
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
            sources = sorted(demo.iterdir())
            for source in sources:
                shutil.copyfile(source, Path(partial) / source.name)
            for source in sources:
                os.replace(Path(partial) / source.name, dest / source.name)
    except OSError as error:
        raise UserError(
            "cannot write the demo model", found=str(error), do="name another folder"
        ) from error
    return dest
