import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, run
from strategies import FLOATS, NUMBERS, QUICK, tensor_and_axes, tensor_and_axis, values

from ane_moe.runtime.reference.ops.arithmetic import RUN


def log_sum_exp(x: np.ndarray, **where: object) -> np.ndarray:
    return torch.logsumexp(torch.from_numpy(x), where["axis"], where["keepdims"]).numpy()  # type: ignore[call-overload]


NUMPY = {
    "reduce_sum": np.sum,
    "reduce_mean": np.mean,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_l1_norm": lambda x, **where: np.sum(np.abs(x), **where),
    "reduce_l2_norm": lambda x, **where: np.sqrt(np.sum(x * x, **where)),
    "reduce_sum_square": lambda x, **where: np.sum(x * x, **where),
    "reduce_log_sum_exp": log_sum_exp,
}


@pytest.mark.parametrize("op", sorted(NUMPY))
@given(case=tensor_and_axes(FLOATS), keep=st.booleans())
@QUICK
def test_a_reduction_agrees_with_numpy(
    op: str, case: tuple[np.ndarray, list[int]], keep: bool
) -> None:
    x, axes = case
    expected = NUMPY[op](x.astype(np.float64), axis=tuple(axes), keepdims=keep).astype(x.dtype)
    assert_same(
        run(op, {"x": x}, {"axes": axes, "keep_dims": keep})[0], expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "op", ["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum_square"]
)
@given(case=tensor_and_axes((np.int32,)), keep=st.booleans())
@QUICK
def test_a_reduction_of_integers_stays_integer(
    op: str, case: tuple[np.ndarray, list[int]], keep: bool
) -> None:
    x, axes = case
    assert_same(
        run(op, {"x": x}, {"axes": axes, "keep_dims": keep})[0],
        NUMPY[op](x, axis=tuple(axes), keepdims=keep).astype(np.int32),
    )


@pytest.mark.parametrize(
    "op", ["reduce_sum", "reduce_mean", "reduce_max", "reduce_log_sum_exp", "reduce_l2_norm"]
)
@pytest.mark.parametrize("keep", [True, False])
def test_a_reduction_without_axes_takes_all_of_them(op: str, keep: bool) -> None:
    x = values((2, 3, 4), np.float32, 1)
    expected = NUMPY[op](x.astype(np.float64), axis=(0, 1, 2), keepdims=keep).astype(np.float32)
    assert_same(run(op, {"x": x}, {"keep_dims": keep})[0], expected, rtol=1e-5)


def test_reduce_log_sum_is_the_logarithm_of_the_sum() -> None:
    x = abs(values((3, 4), np.float32, 1))
    assert_same(run("reduce_log_sum", {"x": x}, {"axes": [1]})[0], np.log(x.sum(1)), rtol=1e-5)


def test_log_sum_exp_neither_overflows_nor_loses_minus_infinity() -> None:
    x = np.array([[1000, 1000], [-np.inf, -np.inf]], np.float32)
    expected = np.array([1000 + np.log(2), -np.inf], np.float32)
    assert_same(run("reduce_log_sum_exp", {"x": x}, {"axes": [1]})[0], expected)


@pytest.mark.parametrize("op, oracle", [("reduce_argmax", np.argmax), ("reduce_argmin", np.argmin)])
@given(case=tensor_and_axis(NUMBERS), keep=st.booleans())
@QUICK
def test_argmax_and_argmin_take_the_first_of_equals(
    op: str, oracle: object, case: tuple[np.ndarray, int], keep: bool
) -> None:
    x, axis = case
    x = np.round(x)  # many ties
    expected = oracle(x, axis=axis, keepdims=keep).astype(np.int32)  # type: ignore[operator]
    assert_same(run(op, {"x": x}, {"axis": axis, "keep_dims": keep})[0], expected)


def test_argmax_answers_in_uint16_when_asked() -> None:
    (out,) = run(
        "reduce_argmax",
        {"x": np.array([[1, 3, 2]], np.float32)},
        {"axis": 1, "output_dtype": "uint16"},
    )
    assert out.dtype == np.uint16 and out.tolist() == [1]


@given(case=tensor_and_axis(FLOATS))
@QUICK
def test_softmax_agrees_with_pytorch(case: tuple[np.ndarray, int]) -> None:
    x, axis = case
    expected = torch.softmax(torch.from_numpy(x * 10).float(), axis).numpy().astype(x.dtype)
    assert_same(run("softmax", {"x": x * 10}, {"axis": axis})[0], expected, rtol=1e-5)


@given(
    batch=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    seed=st.integers(0, 999),
    mask=st.sampled_from(["none", "bool", "float", "row"]),
    dtype=st.sampled_from(FLOATS),
)
@QUICK
def test_attention_agrees_with_pytorch(batch: list[int], seed: int, mask: str, dtype: type) -> None:
    query, key, value = (
        values((*batch, n, d), dtype, seed + i, 1.0)
        for i, (n, d) in enumerate([(3, 4), (5, 4), (5, 2)])
    )
    tensors = {"query": query, "key": key, "value": value}
    if mask == "bool":
        tensors["attn_mask"] = values((3, 5), np.bool_, seed) | np.eye(3, 5, dtype=bool)
    elif mask != "none":
        tensors["attn_mask"] = values((*batch, 3, 5) if mask == "float" else (1, 5), dtype, seed)
    wide = [
        torch.from_numpy(t if t.dtype == bool else t.astype(np.float32)) for t in tensors.values()
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide).numpy().astype(dtype)
    assert_same(run("scaled_dot_product_attention", tensors)[0], expected, rtol=1e-4, atol=1e-5)


def test_fp16_precision_rounds_partial_sums_and_overflows_as_fp16_does() -> None:
    x = np.full((1, 4096), 20.0, np.float16)  # the sum, 81920, is beyond fp16
    assert np.isinf(run("reduce_mean", {"x": x}, {"axes": [1]}, precision="fp16")[0]).all()
    assert run("reduce_mean", {"x": x}, {"axes": [1]})[0].tolist() == [20.0]
    many = abs(values((1, RUN * 64), np.float16, 3))
    exact = float(run("reduce_sum", {"x": many}, {"axes": [1]})[0][0])
    narrow = float(run("reduce_sum", {"x": many}, {"axes": [1]}, precision="fp16")[0][0])
    assert exact != narrow and abs(exact - narrow) < 1e-2 * exact


def test_fp16_precision_leaves_short_sums_alone() -> None:
    x = values((3, RUN), np.float16, 0)
    (narrow,) = run("reduce_sum", {"x": x}, {"axes": [1]}, precision="fp16")
    assert_same(narrow, run("reduce_sum", {"x": x}, {"axes": [1]})[0])
