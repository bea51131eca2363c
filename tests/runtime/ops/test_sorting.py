import coremltools as ct
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, infer, run
from strategies import FLOATS, NUMBERS, QUICK, tensor_and_axis, tensors, values

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType


@given(case=tensor_and_axis(NUMBERS), k=st.integers(1, 5), ascending=st.booleans())
@QUICK
def test_topk_takes_the_first_of_equals_in_order(
    case: tuple[np.ndarray, int], k: int, ascending: bool
) -> None:
    x, axis = case
    x = np.round(x)
    k = min(k, x.shape[axis])
    order = np.argsort(x if ascending else -x, axis=axis, kind="stable").take(np.arange(k), axis)
    values_, indices = run("topk", {"x": x}, {"k": k, "axis": axis, "ascending": ascending})
    assert_same(indices, order.astype(np.int32))
    assert_same(values_, np.take_along_axis(x, order, axis))


def test_topk_without_indices_with_uint16_indices_and_of_everything() -> None:
    x = np.array([[3, 1, 2]], np.float32)
    (only,) = run("topk", {"x": x}, {"k": 2, "axis": -1, "return_indices": False}, ct.target.iOS16)
    assert only.tolist() == [[3, 2]]
    _, indices = run("topk", {"x": x}, {"k": 2, "axis": -1, "output_indices_dtype": "uint16"})
    assert indices.dtype == np.uint16 and indices.tolist() == [[0, 2]]
    everything, order = run(
        "topk",
        {"x": x},
        {"k": -1, "axis": 1},
        outputs=[TensorType("fp32", (1, 3)), TensorType("int32", (1, 3))],
    )
    assert everything.tolist() == [[3, 2, 1]] and order.tolist() == [[0, 2, 1]]


@given(case=tensor_and_axis(NUMBERS), ascending=st.booleans())
@QUICK
def test_argsort_is_a_stable_sort(case: tuple[np.ndarray, int], ascending: bool) -> None:
    x, axis = case
    expected = np.argsort(x if ascending else -x, axis=axis, kind="stable").astype(np.int32)
    assert_same(run("argsort", {"x": x}, {"axis": axis, "ascending": ascending})[0], expected)


@given(
    case=tensor_and_axis(NUMBERS),
    exclusive=st.booleans(),
    reverse=st.booleans(),
    precision=st.sampled_from(["fp32", "fp16"]),
)
@QUICK
def test_cumsum_agrees_with_numpy(
    case: tuple[np.ndarray, int], exclusive: bool, reverse: bool, precision: str
) -> None:
    x, axis = case
    axis = axis % x.ndim
    wide = x if x.dtype == np.int32 else x.astype(np.float64)
    turned = np.flip(wide, axis) if reverse else wide
    total = np.cumsum(turned, axis)
    total = total - turned if exclusive else total
    total = np.flip(total, axis) if reverse else total
    (out,) = run(
        "cumsum",
        {"x": x},
        {"axis": axis, "exclusive": exclusive, "reverse": reverse},
        precision=precision,
    )
    assert_same(out, total.astype(x.dtype), rtol=1e-5, atol=2e-2 if precision == "fp16" else 5e-3)


@given(
    indices=tensors((np.int32,), low=1, high=3),
    axis=st.integers(-4, 3),
    dtype=st.sampled_from(NUMBERS),
)
@QUICK
def test_one_hot_agrees_with_pytorch(indices: np.ndarray, axis: int, dtype: type) -> None:
    if not -indices.ndim - 1 <= axis <= indices.ndim:
        return
    indices = abs(indices) % 4
    hot = torch.nn.functional.one_hot(torch.from_numpy(indices).long(), 4).numpy()
    expected = np.moveaxis(np.where(hot, dtype(3), dtype(-1)), -1, axis)
    params = {"one_hot_vector_size": 4, "axis": axis, "on_value": dtype(3), "off_value": dtype(-1)}
    assert_same(run("one_hot", {"indices": indices}, params)[0], expected)


@given(x=tensors((*NUMBERS, np.bool_), smallest=0))
@QUICK
def test_non_zero_lists_indices_row_by_row(x: np.ndarray) -> None:
    x = np.round(x / 2).astype(x.dtype) if x.dtype != bool else x
    expected = np.stack(np.nonzero(x), -1).astype(np.int32)
    assert_same(run("non_zero", {"x": x})[0], expected)


@pytest.mark.parametrize("value", [np.float16(1.5), np.float32(-2), np.int32(7), np.bool_(True)])
def test_fill_and_fill_like_take_the_type_of_their_value(value: np.generic) -> None:
    expected = np.full((2, 3), value)
    (filled,) = run("fill", {}, {"shape": [2, 3], "value": value})
    (like,) = run("fill_like", {"ref_tensor": np.zeros((2, 3), np.int32)}, {"value": value})
    for out in (filled, like):
        assert_same(out, expected)
        assert out.dtype == expected.dtype


@pytest.mark.parametrize(
    "start, end, step", [(0, 5, 1), (5, 0, -2), (1, 1, 1), (0, 10, 3), (-3, 4, 2)]
)
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_range_agrees_with_numpy(start: int, end: int, step: int, dtype: type) -> None:
    params = {"start": dtype(start), "end": dtype(end), "step": dtype(step)}
    assert_same(run("range_1d", {}, params)[0], np.arange(start, end, step).astype(dtype))


def test_a_range_with_a_computed_end_has_the_length_it_needs() -> None:
    params = {"start": np.int32(0), "step": np.int32(1)}
    (out,) = run(
        "range_1d", {"end": np.array(4, np.int32)}, params, outputs=[TensorType("int32", (None,))]
    )
    assert out.tolist() == [0, 1, 2, 3]


@given(
    x=tensors(FLOATS, smallest=3),
    seed=st.integers(0, 999),
    count=st.integers(1, 4),
    mode=st.sampled_from(["constant", "reflect", "replicate"]),
)
@QUICK
def test_pad_agrees_with_coremltools(x: np.ndarray, seed: int, count: int, mode: str) -> None:
    count = min(count, x.ndim)
    pad = np.random.default_rng(seed).integers(0, 3, 2 * count).astype(np.int32)
    params = {"pad": pad, "mode": mode, "constant_val": x.dtype.type(1.5)}
    assert_same(run("pad", {"x": x}, params)[0], infer("pad", {"x": x}, params)[0])


def test_a_reflection_longer_than_the_axis_is_refused() -> None:
    with pytest.raises(UserError, match=r"op pad.*cannot reflect 3"):
        run("pad", {"x": values((2, 3), np.float32, 0)}, {"pad": [3, 0], "mode": "reflect"})
