"""What a conversion holds beside its shards: the embedding table, the router tables, and what
decodes labels."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, Hasher, TensorSource
from ane_moe.checkpoints.folder import folders_of
from ane_moe.conversion.early import bias_source, read_bias, router_table, table_sources
from ane_moe.conversion.plan import ConversionPlan
from ane_moe.files import replaced
from ane_moe.formats.recipe import find_format
from ane_moe.hashed_file import HashedFile
from ane_moe.model.weight import WeightName

EMBED_CHUNK_BYTES = 1 << 20  # read and written while they are in the cache
# Of a token classifier, where it has them: biases for what label may follow which.
LABEL_FILES = ("viterbi_calibration.json",)
# Below fp16's end; the order of logits does not change with the scale, and sigmoids of such ones
# hardly do.
LARGEST = 60_000


def write_embedding(
    checkpoint: Checkpoint,
    source: TensorSource,
    path: Path,
    form: str,
    hasher: Hasher,
    writer: str = "",
) -> str:
    """The embedding table, a run of rows at a time: fp16, or int8 and then the rows' scales
    (loop/embedding_table.py). `hasher` is fed what is read, `writer` is as of `replaced`. Returns
    the file's sha256 (hex)."""
    rows, width = source.shape
    step = max(1, EMBED_CHUNK_BYTES // (2 * width))
    buffer = np.empty((step, width), np.float16)
    scales: list[np.ndarray] = []
    with replaced(path, writer) as temporary, HashedFile(temporary) as file:
        for first in range(0, rows, step):
            last = min(first + step, rows)
            run = source.part(first, last)
            part = checkpoint.read(run, out=buffer[: last - first], hasher=hasher)
            if (encoded := find_format(form).encode(part)) is None:
                file.write(part)
            else:
                (linear,) = encoded.arrays
                file.write(linear["data"])
                scales.append(linear["scale"].reshape(-1))
        for scale in scales:
            file.write(scale)
    return file.sha256


def copy_label_files(checkpoint: Path, out: Path) -> None:
    """Take over what the checkpoint has of LABEL_FILES; one that an earlier run left goes."""
    for name in LABEL_FILES:
        (out / name).unlink(missing_ok=True)
        there = [one / name for one in folders_of(checkpoint) if (one / name).is_file()]
        if there:
            with replaced(out / name) as temporary:
                shutil.copyfile(there[0], temporary)


def write_routers(
    checkpoint: Checkpoint,
    sources: Mapping[WeightName, TensorSource],
    plan: ConversionPlan,
    out: Path,
) -> None:
    """Write each layer's router, fp16 `[E,d]` with the norm's weight folded in and then the bias
    `[E]` that experts are ranked with, if any, to its path below `out`."""
    rankings = plan.rankings
    for layer, path in plan.routers.items():
        table = router_table(checkpoint, table_sources(sources, layer), rankings[layer])
        table /= max(1.0, float(np.abs(table).max()) / LARGEST)
        bias = bias_source(sources, layer, rankings[layer])
        target = out / path
        target.parent.mkdir(exist_ok=True)
        with replaced(target) as temporary:
            parts = [table] if bias is None else [table, read_bias(checkpoint, bias)]
            np.concatenate([one.astype("<f2").reshape(-1) for one in parts]).tofile(temporary)
