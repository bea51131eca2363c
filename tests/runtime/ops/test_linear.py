import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, run
from strategies import FLOATS, QUICK, values

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType


@given(
    batch_x=st.lists(st.integers(1, 3), max_size=2),
    ones=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
@QUICK
def test_matmul_agrees_with_numpy(
    batch_x: list[int],
    ones: bool,
    sizes: tuple[int, int, int],
    flip_x: bool,
    flip_y: bool,
    dtype: type,
    seed: int,
) -> None:
    m, k, n = sizes
    x = values((*batch_x, m, k), dtype, seed)
    y = values((*([1] * len(batch_x) if ones else batch_x), k, n), dtype, seed + 1)
    expected = (x.astype(np.float64) @ y.astype(np.float64)).astype(dtype)
    given_x = np.ascontiguousarray(x.swapaxes(-1, -2)) if flip_x else x
    given_y = np.ascontiguousarray(y.swapaxes(-1, -2)) if flip_y else y
    params = {"transpose_x": flip_x, "transpose_y": flip_y}
    assert_same(
        run("matmul", {"x": given_x, "y": given_y}, params)[0], expected, rtol=1e-5, atol=1e-5
    )


def test_matmul_multiplies_integers_exactly() -> None:
    x, y = values((3, 4), np.int32, 0), values((4, 2), np.int32, 1)
    assert_same(run("matmul", {"x": x, "y": y})[0], x @ y)


@pytest.mark.parametrize("types", [(np.int32, np.float32), (np.float16, np.int32)])
def test_whole_numbers_and_floats_multiply_as_floats(types: tuple[type, type]) -> None:
    x, y = values((3, 4), types[0], 0), values((4, 2), types[1], 1)
    dtype = next(kind for kind in types if kind != np.int32)
    expected = (x.astype(np.float64) @ y.astype(np.float64)).astype(dtype)
    name = "fp16" if dtype == np.float16 else "fp32"
    (out,) = run("matmul", {"x": x, "y": y}, outputs=[TensorType(name, (3, 2))])
    assert_same(out, expected, rtol=1e-3)


@pytest.mark.parametrize("of_constant", [np.int32, np.float16, np.float32])
@pytest.mark.parametrize("of_input", [np.int32, np.float16, np.float32])
@pytest.mark.parametrize("constant", ["x", "y"])
def test_a_product_is_of_the_type_of_the_side_that_is_not_constant(
    constant: str, of_input: type, of_constant: type
) -> None:
    whole = {"x": values((3, 4), np.int32, 0), "y": values((4, 2), np.int32, 1)}
    given = {
        key: array.astype(of_constant if key == constant else of_input)
        for key, array in whole.items()
    }
    params = {constant: given.pop(constant)}
    (out,) = run("matmul", given, params)
    assert out.dtype == of_input
    assert_same(out, (whole["x"] @ whole["y"]).astype(of_input))


@pytest.mark.parametrize("of_weight", [np.int32, np.float16, np.float32])
@pytest.mark.parametrize("of_x", [np.int32, np.float16, np.float32])
def test_linear_is_of_the_type_of_its_input(of_x: type, of_weight: type) -> None:
    x, weight, bias = (values(shape, np.int32, i) for i, shape in enumerate([(2, 5), (3, 5), (3,)]))
    params = {"weight": weight.astype(of_weight), "bias": bias.astype(of_weight)}
    (out,) = run("linear", {"x": x.astype(of_x)}, params)
    assert out.dtype == of_x
    assert_same(out, (x @ weight.T + bias).astype(of_x))


@pytest.mark.parametrize("fraction", [0.5, np.nan, 2.0**31])
def test_whole_numbers_times_a_constant_of_others_is_refused(fraction: float) -> None:
    x, y = values((3, 4), np.int32, 0), np.full((4, 2), fraction, np.float32)
    with pytest.raises(UserError, match=r"op matmul .*a constant with fractions"):
        run("matmul", {"x": x}, {"y": y})


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (3,)),
        ((3,), (3, 2)),
        ((2, 3), (3,)),
        ((3,), (4, 3, 2)),
        ((4, 2, 3), (3,)),
    ],
)
def test_matmul_takes_a_vector_as_a_row_on_the_left_and_a_column_on_the_right(
    shapes: tuple,
) -> None:
    x, y = values(shapes[0], np.float32, 0), values(shapes[1], np.float32, 1)
    expected = np.asarray(np.matmul(x, y))
    (out,) = run("matmul", {"x": x, "y": y}, outputs=[TensorType("fp32", expected.shape)])
    assert_same(out, expected, rtol=1e-5)


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
)
@QUICK
def test_linear_agrees_with_pytorch(shape: list[int], bias: bool, dtype: type, seed: int) -> None:
    x = values((*shape, 5), dtype, seed)
    params = {"weight": values((3, 5), dtype, seed + 1)}
    if bias:
        params["bias"] = values((3,), dtype, seed + 2)
    wide = [torch.from_numpy(array.astype(np.float32)) for array in (x, *params.values())]
    expected = torch.nn.functional.linear(*wide).numpy().astype(dtype)
    assert_same(run("linear", {"x": x}, params)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "equation, x_shape, y_shape",
    [
        ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
        ("nchw,nwhu->nchu", (1, 3, 1, 5), (2, 5, 4, 6)),
        ("chw,whr->chr", (3, 4, 5), (5, 4, 6)),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_einsum_agrees_with_numpy(
    equation: str, x_shape: tuple, y_shape: tuple, precision: str
) -> None:
    x, y = values(x_shape, np.float32, 0), values(y_shape, np.float32, 1)
    widest = [max(a, b) for a, b in zip(x_shape, (y_shape[0], *x_shape[1:]), strict=True)]
    full = np.broadcast_to(x, widest) if len(x_shape) == 4 else x
    if len(x_shape) == 4 and x_shape[2] == 1:
        full = np.broadcast_to(full, (y_shape[0], x_shape[1], y_shape[2], x_shape[3]))
    (out,) = run("einsum", {"values": [x, y]}, {"equation": equation}, precision=precision)
    assert_same(
        out, np.einsum(equation, full, y), *((1e-5, 1e-5) if precision == "fp32" else (1e-2, 1e-2))
    )


def test_fp16_precision_of_a_product_rounds_partial_sums() -> None:
    x, y = values((4, 2048), np.float16, 0), values((2048, 8), np.float16, 1)
    (exact,) = run("matmul", {"x": x, "y": y})
    (narrow,) = run("matmul", {"x": x, "y": y}, precision="fp16")
    reference = x.astype(np.float64) @ y.astype(np.float64)
    assert abs(exact - reference).max() < abs(narrow - reference).max() < 2


def test_shapes_that_do_not_multiply_are_named_with_op_and_function() -> None:
    x, y = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    with pytest.raises(UserError, match="op matmul 'matmul' in function 'main'"):
        run("matmul", {"x": x, "y": y}, outputs=[TensorType("fp32", (2, 2))])
