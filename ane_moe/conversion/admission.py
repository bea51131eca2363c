"""What the workers of a conversion, or of a proof of one, have to have."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ane_moe.checkpoints.weight_file import WeightFile
from ane_moe.remote_folder import RemoteFolder


@dataclass(frozen=True)
class Admission:
    """Asked of each before anything is begun: the `files` to read, the file `marker` in
    `out`, to which they can write where they are to (`writes`), and these `packages` beside those
    that all need."""

    files: Collection[WeightFile]
    out: Path | RemoteFolder
    marker: str
    packages: Collection[str] = ()
    writes: bool = True
