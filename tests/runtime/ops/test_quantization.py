import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, infer, run
from strategies import QUICK, tensors, values

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType


@given(
    x=tensors((np.float32,), low=2),
    unsigned=st.booleans(),
    shifted=st.booleans(),
    per_channel=st.booleans(),
)
@QUICK
def test_quantize_agrees_with_coremltools(
    x: np.ndarray, unsigned: bool, shifted: bool, per_channel: bool
) -> None:
    dtype = np.uint8 if unsigned else np.int8
    count = x.shape[1]
    scale = np.linspace(0.01, 0.2, count).astype(np.float32) if per_channel else np.float32(0.05)
    params: dict = {"scale": scale, "output_dtype": dtype.__name__}
    if shifted:
        params["zero_point"] = np.arange(count).astype(dtype) if per_channel else dtype(3)
    if per_channel:
        params["axis"] = 1
    (expected,) = infer("quantize", {"input": x}, params)
    (out,) = run("quantize", {"input": x}, params)
    assert_same(out, expected)
    assert out.dtype == dtype


@given(x=tensors((np.int8, np.uint8), low=2), shifted=st.booleans(), per_channel=st.booleans())
@QUICK
def test_dequantize_scales_what_lies_above_the_zero_point(
    x: np.ndarray, shifted: bool, per_channel: bool
) -> None:
    count = x.shape[1]
    shape = (1, count, *[1] * (x.ndim - 2))
    scale = np.linspace(0.01, 0.2, count).astype(np.float32) if per_channel else np.float32(0.05)
    zero = (
        (np.arange(count).astype(x.dtype) if per_channel else x.dtype.type(3))
        if shifted
        else x.dtype.type(0)
    )
    params: dict = (
        {"scale": scale}
        | ({"zero_point": zero} if shifted else {})
        | ({"axis": 1} if per_channel else {})
    )
    spread = scale.reshape(shape) if per_channel else scale
    shift = (
        np.asarray(zero, np.float32).reshape(shape) if per_channel and shifted else np.float32(zero)
    )
    assert_same(run("dequantize", {"input": x}, params)[0], (x.astype(np.float32) - shift) * spread)


def test_quantize_saturates_and_rounds_halves_to_even() -> None:
    x = np.array([-1000, -0.5, 0.5, 1.5, 1000], np.float32)
    (out,) = run("quantize", {"input": x}, {"scale": np.float32(1), "output_dtype": "int8"})
    assert out.tolist() == [-128, 0, 0, 2, 127]


def test_a_scale_per_channel_without_an_axis_is_refused() -> None:
    with pytest.raises(UserError, match=r"op dequantize.*needs an axis"):
        run(
            "dequantize",
            {"input": values((2, 3), np.int8, 0)},
            {"scale": np.ones(3, np.float32)},
            outputs=[TensorType("fp32", (2, 3))],
        )
