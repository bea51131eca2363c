"""The built-in privacy filter, converted on this machine when first used."""

import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ane_moe.demo import privacy_checkpoint
from ane_moe.errors import UserError
from ane_moe.files import scratch_folder
from ane_moe.manifest import FILE_NAME, FORMAT


def privacy_shards(say: Callable[[str], None]) -> Path:
    """The folder of the converted built-in privacy filter, below the user's caches; `say` is told
    when it has to be converted. Raises UserError where it cannot be written."""
    checkpoint = privacy_checkpoint()
    made_of = (version("ane-moe"), str(FORMAT), (checkpoint / "config.json").read_text())
    weights = (checkpoint / "model.safetensors").read_bytes()
    key = hashlib.sha256("\n".join(made_of).encode() + weights).hexdigest()[:16]
    folder = _caches() / f"demo-privacy-{key}"
    if not (folder / FILE_NAME).exists():
        say(f"converting the built-in privacy filter, once, into {folder}")
        _convert(checkpoint, folder)
    return folder


def _convert(checkpoint: Path, folder: Path) -> None:
    from ane_moe.conversion.pipeline import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent, folder.name) as scratch:
            convert(checkpoint, scratch / "out")
            if not (folder / FILE_NAME).exists():  # another process may have been quicker
                os.replace(scratch / "out", folder)
    except OSError as error:
        raise UserError(
            "the built-in privacy filter cannot be converted",
            str(error),
            "convert it yourself: ane-moe convert demo-privacy OUT",
        ) from None


def _caches() -> Path:
    """Where this system keeps what can be made again."""
    own = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or own).expanduser() / "ane-moe"
