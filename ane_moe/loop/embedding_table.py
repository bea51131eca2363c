"""The embedding table as the host reads it: `embed.bin`, mapped into memory.

fp16: `[vocab, d]`, row-major, little endian. int8: the integers, laid out so, then a fp16 scale for
each row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.manifest import Manifest

# Bytes of one row, of width d, in each format the host makes single rows of.
ROW_BYTES: dict[str, Callable[[int], int]] = {"fp16": lambda d: 2 * d, "int8": lambda d: d + 2}


class Int8Table:
    """Integers `[vocab, d]` times fp16 `scales` `[vocab]`; indexed as an array is, by rows, it
    gives fp16."""

    def __init__(self, integers: np.ndarray, scales: np.ndarray):
        self.integers, self.scales = integers, scales

    def __getitem__(self, rows: Any) -> np.ndarray:
        return (self.integers[rows].astype(np.float32) * self.scales[rows][..., None]).astype(
            np.float16
        )


class NoTable:
    """Of a conversion that embeddings enter."""

    def __getitem__(self, rows: Any) -> np.ndarray:
        raise UserError(
            "this conversion has no embedding table",
            "it was made with --inputs embeds",
            "give embeddings, of one call, in place of tokens",
        )


EmbeddingTable = np.ndarray | Int8Table | NoTable


def open_embeddings(folder: Path, manifest: Manifest) -> EmbeddingTable:
    """The table of a conversion, read only. Raises UserError when its size or its format is
    wrong."""
    if manifest.embed is None:
        return NoTable()
    path, vocab, d = folder / manifest.embed, manifest.vocab, manifest.d_model
    if manifest.embed_format not in ROW_BYTES:
        raise UserError(
            f"{path} has an unknown format", repr(manifest.embed_format), "convert again"
        )
    expected = vocab * ROW_BYTES[manifest.embed_format](d)
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise UserError(
            f"{path} is not the embedding table",
            "no file" if found is None else f"{found} bytes",
            f"{expected} bytes were expected; convert again",
        )
    if manifest.embed_format == "fp16":
        return np.memmap(path, dtype="<f2", mode="r", shape=(vocab, d))
    integers = np.memmap(path, dtype=np.int8, mode="r", shape=(vocab, d))
    return Int8Table(
        integers, np.memmap(path, dtype="<f2", mode="r", offset=vocab * d, shape=(vocab,))
    )
