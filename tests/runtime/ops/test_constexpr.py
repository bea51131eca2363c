"""Compressed weights, against the decompression of coremltools' own ops."""

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as ios16
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ios18
from coremltools.optimize import _utils as optimize
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, run
from strategies import FLOATS, QUICK, values

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.ops.constexpr import unpack_bits

OLD = ct.target.iOS16
NAMES = {np.float16: "fp16", np.float32: "fp32", np.int8: "int8", np.uint8: "uint8"}


def expect(op: str, params: dict, expected: np.ndarray, target: object = ct.target.iOS18) -> None:
    (out,) = run(
        op, {}, params, target, outputs=[TensorType(NAMES[expected.dtype.type], expected.shape)]
    )
    assert_same(out, expected)
    assert out.dtype == expected.dtype


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@given(count=st.integers(1, 40), seed=st.integers(0, 999))
@QUICK
def test_packed_fields_unpack_from_the_least_significant_bit(
    bits: int, count: int, seed: int
) -> None:
    fields = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed = optimize.pack_elements_into_bits(fields, bits)
    assert unpack_bits(torch.from_numpy(packed), bits, count).tolist() == fields.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("dtype", [*FLOATS, np.int8])
def test_a_packed_palette_agrees_with_coremltools(bits: int, dtype: type) -> None:
    rng = np.random.default_rng(bits)
    shape = (3, 5, 2)
    lut = (rng.standard_normal(2**bits) * 20).astype(dtype)
    indices = optimize.pack_elements_into_bits(
        rng.integers(0, 2**bits, shape).astype(np.uint8), bits
    )
    params = {"indices": indices, "lut": lut, "shape": np.array(shape, np.uint32)}
    expect(
        "constexpr_lut_to_dense",
        params,
        ios16.constexpr_lut_to_dense.decompress(lut, indices, shape),
        OLD,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_packed_mask_agrees_with_coremltools(dtype: type) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.standard_normal((4, 5)) * (rng.random((4, 5)) < 0.4)).astype(dtype)
    mask = np.packbits((dense != 0).ravel(), bitorder="little")
    params = {
        "nonzero_data": dense[dense != 0],
        "mask": mask,
        "shape": np.array(dense.shape, np.uint32),
    }
    expect("constexpr_sparse_to_dense", params, dense, OLD)


@given(
    axis=st.integers(-3, 2),
    vector=st.booleans(),
    vector_zero=st.booleans(),
    unsigned=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@QUICK
def test_affine_weights_agree_with_coremltools(
    axis: int, vector: bool, vector_zero: bool, unsigned: bool, dtype: type, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stored = np.uint8 if unsigned else np.int8
    data = rng.integers(np.iinfo(stored).min, np.iinfo(stored).max + 1, (3, 4, 5)).astype(stored)
    count = data.shape[axis]
    scale = rng.random(count).astype(dtype) if vector else dtype(0.1)
    zero = rng.integers(0, 10, count).astype(stored) if vector_zero else stored(3)
    params = {"quantized_data": data, "zero_point": zero, "scale": scale, "axis": axis}
    expected = ios16.constexpr_affine_dequantize.decompress(
        data, np.asarray(zero), np.asarray(scale, np.float32), axis
    )
    expect("constexpr_affine_dequantize", params, expected.astype(dtype), OLD)


def test_a_cast_weight_becomes_fp32() -> None:
    x = values((2, 3), np.float16, 0)
    for target in (OLD, ct.target.iOS18):
        expect(
            "constexpr_cast",
            {"source_val": x, "output_dtype": "fp32"},
            x.astype(np.float32),
            target,
        )


@st.composite
def blocked(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shape = tuple(count * draw(st.integers(1, 3)) for count in blocks)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    stored = draw(st.sampled_from([np.int8, np.uint8]))
    data = rng.integers(np.iinfo(stored).min, np.iinfo(stored).max + 1, shape).astype(stored)
    scale = rng.random(blocks).astype(draw(st.sampled_from(FLOATS)))
    return data, scale, rng.integers(0, 20, blocks).astype(stored)


@given(case=blocked(), shifted=st.booleans())
@QUICK
def test_blockwise_scales_agree_with_coremltools(case: tuple, shifted: bool) -> None:
    data, scale, offset = case
    expected = ios18.constexpr_blockwise_shift_scale.decompress(
        data, scale.astype(np.float32), offset.astype(np.float32) if shifted else None
    ).astype(scale.dtype)
    params = {"data": data, "scale": scale} | ({"offset": offset} if shifted else {})
    expect("constexpr_blockwise_shift_scale", params, expected)


def test_blocks_that_do_not_divide_the_weight_are_refused() -> None:
    params = {"data": np.zeros((5, 2), np.int8), "scale": np.ones((2, 1), np.float16)}
    with pytest.raises(
        UserError, match=r"op constexpr_blockwise_shift_scale.*do not divide axis 0"
    ):
        run("constexpr_blockwise_shift_scale", {}, params, outputs=[TensorType("fp16", (5, 2))])


@st.composite
def palettes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int | None]:
    groups = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = tuple(count * draw(st.integers(1, 3)) for count in groups)
    bits, vector = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.sampled_from([1, 1, 2, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    lut = (rng.standard_normal((*groups, 2**bits, vector)) * 20).astype(
        draw(st.sampled_from([*FLOATS, np.int8]))
    )
    axis = draw(st.integers(-len(shape), len(shape) - 1)) if vector > 1 else None
    return rng.integers(0, 2**bits, shape).astype(np.uint8), lut, axis


@given(case=palettes())
@QUICK
def test_grouped_and_vector_palettes_agree_with_coremltools(case: tuple) -> None:
    indices, lut, axis = case
    params = {"indices": indices, "lut": lut} | ({"vector_axis": axis} if axis is not None else {})
    expect(
        "constexpr_lut_to_dense",
        params,
        ios18.constexpr_lut_to_dense.decompress(indices, lut, axis),
    )


def test_the_worked_example_of_a_grouped_palette() -> None:
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float16).reshape(2, 1, 4, 1)
    expected = np.array([[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]], np.float16)
    expect("constexpr_lut_to_dense", {"indices": indices, "lut": lut}, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_worked_example_of_a_vector_palette(axis: int) -> None:
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    lut = np.array([10, 11, 12, 20, 21, 22], np.int8).reshape(1, 1, 1, 2, 3)
    vectors = lut.reshape(2, 3)[indices]
    expected = (
        np.concatenate(
            [np.concatenate([vectors[:, i : i + 1, :, k] for k in range(3)], 1) for i in range(2)],
            1,
        )
        if axis == 1
        else (vectors.reshape(2, 2, 6))
    )
    expect(
        "constexpr_lut_to_dense", {"indices": indices, "lut": lut, "vector_axis": axis}, expected
    )


@given(case=palettes(), seed=st.integers(0, 99))
@QUICK
def test_a_sparse_palette_agrees_with_coremltools(case: tuple, seed: int) -> None:
    indices, lut, axis = case
    mask = values(indices.shape, np.bool_, seed).astype(np.uint8)
    params = {"indices_mask": mask, "indices_nonzero_data": indices[mask != 0], "lut": lut}
    params |= {"vector_axis": axis} if axis is not None else {}
    their_mask, their_data = ios18.constexpr_lut_to_sparse.decompress(
        mask, indices[mask != 0], lut, axis
    )
    our_mask, our_data = run(
        "constexpr_lut_to_sparse",
        {},
        params,
        outputs=[
            TensorType("uint1", their_mask.shape),
            TensorType(NAMES[lut.dtype.type], their_data.shape),
        ],
    )
    assert_same(our_mask, their_mask)
    assert_same(our_data, their_data)


@given(case=blocked(), shifted=st.booleans(), seed=st.integers(0, 99))
@QUICK
def test_sparse_blockwise_scales_agree_with_coremltools(
    case: tuple, shifted: bool, seed: int
) -> None:
    data, scale, offset = case
    mask = values(data.shape, np.bool_, seed).astype(np.uint8)
    nonzero = data[mask != 0]
    _, expected = ios18.constexpr_sparse_blockwise_shift_scale.decompress(
        mask, nonzero, scale.astype(np.float32), offset.astype(np.float32) if shifted else None
    )
    params = {"data_mask": mask, "nonzero_data": nonzero, "scale": scale} | (
        {"offset": offset} if shifted else {}
    )
    our_mask, ours = run(
        "constexpr_sparse_blockwise_shift_scale",
        {},
        params,
        outputs=[
            TensorType("uint1", mask.shape),
            TensorType(NAMES[scale.dtype.type], nonzero.shape),
        ],
    )
    assert_same(our_mask, mask)
    assert_same(ours, expected.astype(scale.dtype))


def test_a_sparse_weight_agrees_with_coremltools_and_a_wrong_mask_is_refused() -> None:
    mask = np.array([[1, 0, 1], [0, 0, 1]], np.uint8)
    data = np.array([1, 2, 3], np.float16)
    expect(
        "constexpr_sparse_to_dense",
        {"nonzero_data": data, "mask": mask},
        ios18.constexpr_sparse_to_dense.decompress(data, mask),
    )
    with pytest.raises(UserError, match=r"op constexpr_sparse_to_dense.*3 set bits for 2"):
        run(
            "constexpr_sparse_to_dense",
            {},
            {"nonzero_data": data[:2], "mask": mask},
            outputs=[TensorType("fp16", (2, 3))],
        )
