"""What gives the numbers of a GGUF file's tensors, row by row, fp32.

Blocks are decoded by the `gguf` package, whose arithmetic is that of ggml's `dequantize_row_*`.
"""

import importlib.util
from dataclasses import dataclass, replace

import numpy as np

from ane_moe.checkpoints.coded import E8M0, FP4, SIGNED, stored_bytes
from ane_moe.checkpoints.stored_tensor import Codec, Pieces, StoredTensor
from ane_moe.errors import UserError
from ane_moe.half import STORED, widened

PACKAGE = "gguf"


@dataclass(frozen=True)
class TensorType:
    """A type of ggml: `block` elements of a row are `size` bytes. `decoded`: gguf knows how."""

    name: str
    block: int
    size: int
    decoded: bool = True


# By their numbers in ggml.h.
TYPES = {
    0: TensorType("F32", 1, 4, decoded=False),
    1: TensorType("F16", 1, 2, decoded=False),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40, decoded=False),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292, decoded=False),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1, decoded=False),
    25: TensorType("I16", 1, 2, decoded=False),
    26: TensorType("I32", 1, 4, decoded=False),
    27: TensorType("I64", 1, 8, decoded=False),
    28: TensorType("F64", 1, 8, decoded=False),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2, decoded=False),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18, decoded=False),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
# Of blocks that are a scale and numbers, what each code means before it is scaled (ggml's
# `dequantize_row_*`).
LEVELS: dict[str, tuple[float, ...]] = {
    "Q4_0": tuple(map(float, range(-8, 8))),
    "Q8_0": SIGNED,
    "IQ4_NL": tuple(
        map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
    ),
    "MXFP4": tuple(2 * value for value in FP4),
}


@dataclass(frozen=True)
class Rows:
    """Rows of `columns` numbers as a file stores them, in the type of ggml that is its `dtype`."""

    tensor: StoredTensor
    columns: int
    together: int = 1

    def rows(self, first: int, last: int) -> np.ndarray:
        kind = BY_NAME[self.tensor.dtype]
        width = self.columns // kind.block * kind.size
        stored = stored_bytes(self.tensor, first * width, (last - first) * width)
        if kind.decoded:
            return dequantised(stored.reshape(last - first, width), kind.name)
        numbers = stored.view(STORED[kind.name]).reshape(last - first, self.columns)
        return widened(numbers, kind.name)

    @property
    def pieces(self) -> Pieces | None:
        if self.tensor.dtype not in LEVELS:
            return None
        codes, scales = (Piece(self, name) for name in ("codes", "scales"))
        block = BY_NAME[self.tensor.dtype].block
        return Pieces(codes, LEVELS[self.tensor.dtype], 1, block, scales)


@dataclass(frozen=True)
class Piece:
    """Codes or scales of rows of blocks that are nothing else: a scale, then a number for each
    element, of 4 bits those of the block's first half before those of its second."""

    of: Rows
    name: str
    together: int = 1
    pieces: None = None

    @property
    def columns(self) -> int:
        return self.of.columns

    def rows(self, first: int, last: int) -> np.ndarray:
        kind = BY_NAME[self.of.tensor.dtype]
        across = self.columns // kind.block
        start = first * across * kind.size
        stored = stored_bytes(self.of.tensor, start, (last - first) * across * kind.size)
        blocks = stored.reshape(-1, kind.size)
        exponents = kind.name == "MXFP4"
        width = 1 if exponents else 2
        if self.name == "scales":
            raw = np.ascontiguousarray(blocks[:, :width])
            halves = np.array(E8M0, np.float32) / 2
            scales = halves[raw] if exponents else widened(raw.view(STORED["F16"]), "F16")
            return np.repeat(scales, kind.block, axis=1).reshape(last - first, -1)
        codes = blocks[:, width:]
        if codes.shape[1] < kind.block:
            codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        return np.array(LEVELS[kind.name], np.float32)[codes].reshape(last - first, -1)


@dataclass(frozen=True)
class HalfSplit:
    """Rows of heads that llama.cpp has in pairs of neighbours, as transformers has them: of each
    head the first of all pairs, then the second (undoes `LlamaModel.permute`)."""

    inner: Codec
    head: int

    @property
    def columns(self) -> int:
        return self.inner.columns

    @property
    def together(self) -> int:
        return self.head

    def rows(self, first: int, last: int) -> np.ndarray:
        pairs = self.inner.rows(first, last).reshape(-1, self.head // 2, 2, self.columns)
        return pairs.swapaxes(1, 2).reshape(last - first, self.columns)

    @property
    def pieces(self) -> Pieces | None:
        inner = self.inner.pieces
        return inner and inner.through(lambda codec: HalfSplit(codec, self.head))


@dataclass(frozen=True)
class Joined:
    """Of each expert the rows of one stack, then those of another, each `height` of them."""

    upper: Codec
    lower: Codec
    height: int

    @property
    def columns(self) -> int:
        return self.upper.columns

    @property
    def together(self) -> int:
        return 2 * self.height

    def rows(self, first: int, last: int) -> np.ndarray:
        both = (codec.rows(first // 2, last // 2) for codec in (self.upper, self.lower))
        stacks = [rows.reshape(-1, self.height, self.columns) for rows in both]
        return np.concatenate(stacks, axis=1).reshape(last - first, self.columns)

    @property
    def pieces(self) -> Pieces | None:
        upper, lower = self.upper.pieces, self.lower.pieces
        if not upper or not lower or not upper.scales or not lower.scales:
            return None
        if (upper.values, upper.width) != (lower.values, lower.width):
            return None
        codes = Joined(upper.codes, lower.codes, self.height)
        scales = Joined(upper.scales, lower.scales, self.height)
        return replace(upper, codes=codes, scales=scales)


def dequantised(blocks: np.ndarray, kind: str) -> np.ndarray:
    """fp32 of rows of blocks, uint8 `(rows, bytes)`."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # what is not finite is found, and said, by who reads it
        return quants.dequantize(blocks, GGMLQuantizationType[kind])


def require_package(kind: str, where: str) -> None:
    """Raises UserError where blocks cannot be decoded for want of the package."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"{where} is quantised ({kind}), and decoding it needs the package {PACKAGE}",
            do="pip install ane-moe[gguf]",
        )
