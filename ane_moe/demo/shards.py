"""The built-in models, converted on this machine when first used."""

import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ane_moe.demo import BUILT_IN, built_in
from ane_moe.errors import UserError
from ane_moe.files import scratch_folder
from ane_moe.manifest import FILE_NAME, FORMAT
from ane_moe.user_cache import user_cache

Say = Callable[[str], None]


def shards_of(named: Path, say: Say) -> Path:
    """The folder of shards that is `named`: for a built-in model's name, its own; any other path as
    it is. Raises UserError as `built_in_shards`."""
    return built_in_shards(str(named), say) if str(named) in BUILT_IN else named


def built_in_shards(name: str, say: Say) -> Path:
    """The folder of the converted built-in model of that name, below the user's caches; `say` is
    told when it has to be converted. Raises UserError where it cannot be written."""
    checkpoint = built_in(Path(name))
    made_of = (version("ane-moe"), str(FORMAT), (checkpoint / "config.json").read_text())
    weights = (checkpoint / "model.safetensors").read_bytes()
    key = hashlib.sha256("\n".join(made_of).encode() + weights).hexdigest()[:16]
    folder = user_cache() / f"{name}-{key}"
    if not (folder / FILE_NAME).exists():
        say(f"converting the built-in model {name}, once, into {folder}")
        _convert(checkpoint, folder, name)
    return folder


def _convert(checkpoint: Path, folder: Path, name: str) -> None:
    from ane_moe.conversion.pipeline import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent, folder.name) as scratch:
            convert(checkpoint, scratch / "out")
            if not (folder / FILE_NAME).exists():  # another process may have been quicker
                os.replace(scratch / "out", folder)
    except OSError as error:
        raise UserError(
            f"the built-in model {name} cannot be converted",
            str(error),
            f"convert it yourself: ane-moe convert {name} OUT",
        ) from None
