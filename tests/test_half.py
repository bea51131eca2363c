"""Stored numbers become fp16 bit for bit as torch makes them."""

import numpy as np
import pytest
import torch

from ane_moe.half import from_half, narrow_into, narrowed, widened

CODES = np.arange(1 << 16, dtype=np.uint16)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
FINITE = {"BF16": 0x7F80, "F16": 0x7C00}  # the first magnitude that is not


def all_numbers(dtype: str) -> tuple[np.ndarray, torch.Tensor]:
    """Every finite number of a 16-bit type, as we and as torch take it."""
    codes = CODES[FINITE[dtype] > (CODES & 0x7FFF)]
    stored = codes if dtype == "BF16" else codes.view(np.float16)
    return stored, torch.from_numpy(codes.view(np.int16).copy()).view(DTYPES[dtype])


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    array = values if isinstance(values, np.ndarray) else values.numpy()
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("scale", [1.0, 0.22, 12.0, -(2.0**-9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_number_is_rounded_as_by_torch(dtype: str, scale: float) -> None:
    stored, theirs = all_numbers(dtype)
    out = np.empty(len(stored), np.float16)
    narrow_into(out, stored, dtype, scale)
    assert np.array_equal(bits(out), bits((theirs.float() * scale).half()))
    assert np.isinf(out).any() == (dtype == "BF16" or scale > 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_number_is_widened_exactly(dtype: str) -> None:
    stored, theirs = all_numbers(dtype)
    assert np.array_equal(bits(widened(stored, dtype)), bits(theirs.float()))
    if dtype == "F16":
        assert np.array_equal(bits(from_half(stored)), bits(theirs.float()))


def test_fp32_is_rounded_to_even_below_and_above_every_fp16_number() -> None:
    halves = CODES[FINITE["F16"] > (CODES & 0x7FFF)].view(np.float16).astype(np.float32)
    midway = (halves + np.nextafter(halves.astype(np.float16), np.float16(70000))) / 2
    near = np.concatenate([halves, midway, np.nextafter(midway, np.float32(-np.inf))])
    near = np.concatenate([near, np.nextafter(midway, np.float32(np.inf)), near * np.float32(1e-3)])
    for scale in (1.0, 0.37):
        out = np.empty(len(near), np.float16)
        narrow_into(out, near, "F32", scale)
        assert np.array_equal(bits(out), bits((torch.from_numpy(near) * scale).half()))


@pytest.mark.parametrize("scale", [1.0, 0.01, 12.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: str, scale: float) -> None:
    codes = CODES[FINITE[dtype] <= (CODES & 0x7FFF)]
    out = np.empty(len(codes), np.float16)
    narrow_into(out, codes.view(np.float16) if dtype == "F16" else codes, dtype, scale)
    assert not np.isfinite(out).any()
    assert not np.isfinite(narrowed(np.array([np.nan, np.inf, 65520], np.float32))).any()
