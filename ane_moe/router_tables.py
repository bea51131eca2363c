"""Router tables: the routers of dispatched layers as plain files, for guessing experts on the host."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ane_moe.checkpoint import Checkpoint, TensorSource

LARGEST = 60_000        # below fp16's end; which experts score highest does not change with the scale


def write_routers(
    checkpoint: Checkpoint, sources: Mapping[str, TensorSource], paths: Mapping[int, str], out: Path
) -> None:
    """Write each layer's router, fp16 `[E,d]` with the norm's weight folded in, to its path below `out`."""
    for layer, path in paths.items():
        router, norm = (checkpoint.read(sources[f"layers.{layer}.ffn.{name}.weight"]).astype(np.float32)
                        for name in ("router", "norm"))  # fmt: skip
        table = router * norm
        table /= max(1.0, float(np.abs(table).max()) / LARGEST)
        target = out / path
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".writing-{target.name}")
        table.astype("<f2").tofile(temporary)
        os.replace(temporary, target)
