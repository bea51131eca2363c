"""A store of experts on the terminal and as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ane_moe.errors import UserError
from ane_moe.expert_record import Store, read_end
from ane_moe.manifest import Shard, read_manifest

SUFFIX = ".bin"


def find_store(path: Path) -> Shard:
    """What the conversion that `path` lies in says of it. Raises UserError where it is none of its
    stores, or not whole."""
    folder = path.resolve().parent.parent
    manifest = read_manifest(folder)
    name = path.resolve().relative_to(folder).as_posix()
    found = next((shard for shard in manifest.shards if shard.store and shard.path == name), None)
    if found is None or found.store is None:
        raise UserError(f"{path} is no store of {folder}", do="give experts/layer_NN.bin")
    read_end(path, found.store)
    return found


def store_document(shard: Shard) -> dict[str, Any]:
    """The store as JSON data."""
    assert shard.store is not None
    return {"path": shard.path, "layer": shard.layer} | asdict(shard.store)


def store_table(shard: Shard) -> Table:
    """How an expert lies in a record."""
    assert shard.store is not None
    table = Table("weight", "form", "array", "type", "shape", "offset", "bytes", box=None)
    table.title, table.title_justify = _title(shard.path, shard.store), "left"
    for weight in shard.store.record.weights:
        for array in weight.arrays:
            shape = " x ".join(map(str, array.shape))
            numbers = f"{array.offset:,}", f"{array.nbytes:,}"
            table.add_row(weight.name, weight.form, array.key, array.type, shape, *numbers)
    return table


def _title(path: str, store: Store) -> str:
    size, whole = store.record.size, store.record.expanded.size
    return (
        f"{path}: {store.count} experts of {size:,} bytes, expert e at e * {size:,}; "
        f"{whole:,} bytes in memory; computed by {store.graph}"
    )
