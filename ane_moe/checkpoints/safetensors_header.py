"""Reads the header of a safetensors file, trusting nothing in it.

Format: 8 bytes of little-endian header length, the header as JSON, then the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format). Ours rather than the library's, because
weights are read with `readinto` into one reused buffer: pages of a mapped file would count as this
process's memory.
"""

import json
import math
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError
from ane_moe.lfs import FETCH, is_lfs_pointer

MAX_HEADER_BYTES = 100_000_000  # the library's own limit

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file.

    Raises UserError when the file is truncated, is no safetensors file, or describes tensors that
    overlap, leave gaps, reach past the end of the file or do not have the size their shape and
    dtype imply.
    """
    if is_lfs_pointer(path):
        raise UserError(f"{path} is not a safetensors file", "a pointer of Git LFS", FETCH)
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or length > file_bytes - 8:
                raise _damaged(path, f"{file_bytes} bytes, too few for its header")
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"a header of {length} bytes")
            header = json.loads(stream.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "a header that is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {key: _stored_tensor(path, key, entry, 8 + length) for key, entry in header.items()}
    _require_cover(path, tensors, 8 + length, file_bytes)
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name given twice")
    return entries


def _stored_tensor(path: Path, key: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        whole_numbers = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"tensor {key!r} described as {str(entry)[:100]}") from None
    if (
        not whole_numbers
        or len(shape) > 8
        or first > last
        or math.prod(shape) * bits != (last - first) * 8
    ):
        raise _damaged(
            path, f"tensor {key!r} as {dtype}{list(shape)[:9]} in bytes {first} to {last}"
        )
    return StoredTensor(key, path, dtype, shape, data_start + first, last - first)


def _require_cover(
    path: Path, tensors: dict[str, StoredTensor], data_start: int, file_bytes: int
) -> None:
    end = data_start
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != end:
            raise _damaged(path, f"tensor {key!r} starts at byte {tensor.offset} instead of {end}")
        end += tensor.size
    if end != file_bytes:
        state = "truncated" if file_bytes < end else "longer than its header says"
        raise UserError(
            f"{path} is {state}", f"{file_bytes} bytes instead of {end}", "download it again"
        )


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path} is not a sound safetensors file", found, "download it again")
