"""Embeddings that enter a model in place of ids, from a .npy file."""

from pathlib import Path

import numpy as np

from ane_moe.errors import UserError

FLOATS = ("float16", "float32", "float64")


def read_embeddings(path: Path, width: int) -> np.ndarray:
    """The `(T, width)` numbers of a file as fp32. Raises UserError for any other file: nothing in
    it is run, and no more is read than it says it holds."""
    do = f"save a float array (tokens, {width}) with numpy.save"
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever an untrusted file can make numpy raise
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read as embeddings", what, do) from None
    if not isinstance(stored, np.ndarray):
        raise UserError(f"{path} holds several arrays", "an .npz file", do)
    if stored.ndim != 2 or stored.shape[1] != width or not len(stored):
        raise UserError(f"{path} holds no embeddings of this model", f"shape {stored.shape}", do)
    if stored.dtype.name not in FLOATS:
        raise UserError(f"{path} holds no floats", str(stored.dtype), do)
    with np.errstate(over="ignore"):
        numbers = np.asarray(stored, np.float32)
    if broken := int(numbers.size - np.isfinite(numbers).sum()):
        raise UserError(f"{path} holds {broken} numbers that are NaN, infinite or beyond fp32")
    return numbers
