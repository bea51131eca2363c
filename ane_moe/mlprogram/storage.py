"""How elements of each type are stored: their size in bits, and the arrays their bytes become."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Storage:
    """`stored` is the little-endian numpy type of one stored element (uint8 for packed sub-byte
    types)."""

    name: str
    bits: int
    stored: np.dtype
    signed: bool = False


STORAGE = {
    storage.name: storage
    for storage in (
        Storage("fp16", 16, np.dtype("<f2")),
        Storage("fp32", 32, np.dtype("<f4")),
        Storage("fp64", 64, np.dtype("<f8")),
        Storage("bf16", 16, np.dtype("<u2")),
        Storage("fp8e4m3fn", 8, np.dtype("u1")),
        Storage("fp8e5m2", 8, np.dtype("u1")),
        Storage("int4", 4, np.dtype("u1"), signed=True),
        Storage("int8", 8, np.dtype("i1"), signed=True),
        Storage("int16", 16, np.dtype("<i2"), signed=True),
        Storage("int32", 32, np.dtype("<i4"), signed=True),
        Storage("int64", 64, np.dtype("<i8"), signed=True),
        Storage("uint1", 1, np.dtype("u1")),
        Storage("uint2", 2, np.dtype("u1")),
        Storage("uint3", 3, np.dtype("u1")),
        Storage("uint4", 4, np.dtype("u1")),
        Storage("uint6", 6, np.dtype("u1")),
        Storage("uint8", 8, np.dtype("u1")),
        Storage("uint16", 16, np.dtype("<u2")),
        Storage("uint32", 32, np.dtype("<u4")),
        Storage("uint64", 64, np.dtype("<u8")),
        Storage("bool", 8, np.dtype("?")),
    )
}


def stored_size(storage: Storage, count: int) -> int:
    """Bytes that `count` elements take when stored; sub-byte elements are packed and the last byte
    padded."""
    return (count * storage.bits + 7) // 8


def decode(storage: Storage, raw: np.ndarray, count: int) -> np.ndarray:
    """Turn stored bytes (uint8 `[stored_size]`) into `count` elements.

    Whole-byte types are views of `raw`. Sub-byte integers become int8/uint8, bf16 becomes fp32, fp8
    becomes fp16 (each of them exactly).
    """
    if storage.bits < 8:
        return _unpack(storage, raw, count)
    values = raw.view(storage.stored)
    if storage.name == "bf16":
        return (values.astype("<u4") << 16).view("<f4")
    if storage.name == "fp8e5m2":
        return (values.astype("<u2") << 8).view("<f2")
    if storage.name == "fp8e4m3fn":
        return _E4M3FN[values]
    return values


def encode(storage: Storage, values: np.ndarray) -> np.ndarray:
    """The bytes (uint8) that store `values`: their own where an element takes whole bytes, packed
    integers else."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if storage.bits >= 8:
        if flat.dtype != storage.stored:
            raise ValueError(f"{flat.dtype} is not stored as {storage.name}")
        return flat.view(np.uint8)
    return _pack(storage, flat.view(np.uint8))


def _pack(storage: Storage, values: np.ndarray) -> np.ndarray:
    """The reverse of `_unpack`."""
    group_bytes = 3 if 8 % storage.bits else 1
    per_group = group_bytes * 8 // storage.bits
    groups = -(-values.size // per_group)
    padded = (
        values
        if values.size == groups * per_group
        else np.pad(values, (0, groups * per_group - values.size))
    )
    slots = padded.reshape(groups, per_group) & np.uint8((1 << storage.bits) - 1)
    word: np.ndarray = slots[:, 0].astype(np.uint8 if group_bytes == 1 else np.uint32)
    for slot in range(1, per_group):
        word = word | (slots[:, slot].astype(word.dtype) << word.dtype.type(slot * storage.bits))
    if group_bytes == 1:
        return word[: stored_size(storage, values.size)]
    return np.ascontiguousarray(word.view(np.uint8).reshape(groups, 4)[:, :3]).reshape(-1)[
        : stored_size(storage, values.size)
    ]


def _unpack(storage: Storage, raw: np.ndarray, count: int) -> np.ndarray:
    """Elements lie from the least significant bit up, across byte borders for 3 and 6 bits (MILBlob
    SubByteTypes)."""
    group_bytes = 3 if 8 % storage.bits else 1
    per_group = group_bytes * 8 // storage.bits
    groups = -(-count // per_group)
    padded = (
        raw
        if raw.size == groups * group_bytes
        else np.pad(raw, (0, groups * group_bytes - raw.size))
    )
    word = padded if group_bytes == 1 else padded[0::group_bytes].astype("<u4")
    for byte in range(1, group_bytes):
        word |= padded[byte::group_bytes].astype("<u4") << (8 * byte)
    out = np.empty((groups, per_group), np.uint8)
    for slot in range(per_group):
        out[:, slot] = (word >> (slot * storage.bits)) & ((1 << storage.bits) - 1)
    values = out.reshape(-1)[:count]
    if storage.signed:
        sign = 1 << (storage.bits - 1)
        return ((values ^ sign) - sign).view(np.int8)
    return values


def _e4m3fn_table() -> np.ndarray:
    """All 256 values: sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinities, NaN at all
    ones."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype("<f2")


_E4M3FN = _e4m3fn_table()
