import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, infer, run
from strategies import FLOATS, NUMBERS, QUICK, broadcast_pairs, tensors

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.ops import TABLE

UNARY = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "round": np.round,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
    "identity": lambda x: x,
}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "mod": np.mod,
    "floor_div": np.floor_divide,
}
LOGICAL = {
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
NATIVE_EXACT = ["abs", "ceil", "floor", "round", "sign", "square", "relu", "relu6"]
NATIVE_NEAR = [
    "exp",
    "exp2",
    "tanh",
    "sigmoid",
    "silu",
]  # torch has two fp32 kernels, a last bit apart in places
NATIVE_PAIRS = ["add", "sub", "mul", "maximum", "minimum"]


@pytest.mark.parametrize("op", sorted(UNARY))
@given(x=tensors(FLOATS, low=0, smallest=0))
@QUICK
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_unary_op_agrees_with_numpy(op: str, x: np.ndarray) -> None:
    assert_same(run(op, {"x": x})[0], UNARY[op](x.astype(np.float64)).astype(x.dtype), rtol=1e-5)


@pytest.mark.parametrize("op", ["abs", "exp2", "sign", "square"])
def test_a_unary_op_keeps_integers(op: str) -> None:
    x = np.array([[0, 1, 5], [3, 4, 2]], np.int32)
    assert_same(run(op, {"x": x})[0], UNARY[op](x).astype(np.int32))


@pytest.mark.parametrize("op", sorted(BINARY))
@given(pair=broadcast_pairs(smallest=0))
@QUICK
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_binary_op_agrees_with_numpy(op: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    if op in ("mod", "floor_div"):
        y = np.where(y == 0, np.ones_like(y), y)
    wide = (lambda a: a) if x.dtype == np.int32 else (lambda a: a.astype(np.float32))
    expected = BINARY[op](wide(x), wide(y))
    assert_same(
        run(op, {"x": x, "y": y})[0],
        expected if expected.dtype == bool else expected.astype(x.dtype),
    )


@pytest.mark.parametrize("op", sorted(LOGICAL))
@given(pair=broadcast_pairs((np.bool_,)))
@QUICK
def test_a_logical_op_agrees_with_numpy(op: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert_same(run(op, dict(zip("xy", pair, strict=True)))[0], LOGICAL[op](*pair))


@given(pair=broadcast_pairs(FLOATS))
@QUICK
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_real_div_and_pow_agree_with_numpy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
    assert_same(run("real_div", {"x": x, "y": y})[0], (wide_x / wide_y).astype(x.dtype))
    assert_same(
        run("pow", {"x": abs(x), "y": y})[0], (abs(wide_x) ** wide_y).astype(x.dtype), rtol=1e-5
    )


def test_integer_power_and_remainder_follow_python() -> None:
    x, y = np.array([-7, 7, -6, 5], np.int32), np.array([3, -3, 4, 2], np.int32)
    assert run("mod", {"x": x, "y": y})[0].tolist() == [-7 % 3, 7 % -3, -6 % 4, 5 % 2]
    assert run("floor_div", {"x": x, "y": y})[0].tolist() == [-7 // 3, 7 // -3, -6 // 4, 5 // 2]
    assert run("pow", {"x": x, "y": abs(y)})[0].tolist() == [-343, 343, 1296, 25]


@pytest.mark.parametrize(
    "op, params",
    [
        ("inverse", {"epsilon": 1e-3}),
        ("log", {"epsilon": 1e-3}),
        ("rsqrt", {"epsilon": 1e-3}),
        ("clip", {"alpha": -0.5, "beta": 0.75}),
        ("clip", {"alpha": 0.0, "beta": np.inf}),
        ("threshold", {"alpha": 0.3}),
    ],
)
@given(x=tensors(FLOATS))
@QUICK
def test_a_unary_op_with_constants_agrees_with_coremltools(
    op: str, params: dict, x: np.ndarray
) -> None:
    x = np.abs(x) if op in ("log", "rsqrt", "inverse") else x
    typed = {name: x.dtype.type(value) for name, value in params.items()}
    wide = {name: np.float32(value) for name, value in typed.items()}
    (expected,) = infer(op, {"x": x.astype(np.float32)}, wide)
    assert_same(run(op, {"x": x}, typed)[0], expected.astype(x.dtype), rtol=1e-5)


def test_epsilons_default_to_the_documented_values() -> None:
    x = np.array([0.0, 1e-4, 2.0], np.float32)
    assert_same(run("inverse", {"x": x})[0], 1 / (x + np.float32(1e-4)))
    assert_same(run("rsqrt", {"x": x})[0], 1 / np.sqrt(x + np.float32(1e-12)), rtol=1e-5)
    assert np.isfinite(run("log", {"x": x})[0]).all()  # 1e-45 is a denormal, so log(0) stays finite


@given(x=tensors((*NUMBERS, np.bool_)), dtype=st.sampled_from(["fp16", "fp32", "int32", "bool"]))
@QUICK
def test_cast_agrees_with_numpy_and_truncates_towards_zero(x: np.ndarray, dtype: str) -> None:
    target = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}[dtype]
    assert_same(run("cast", {"x": x}, {"dtype": dtype})[0], x.astype(target))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_cast_reaches_the_small_integers_of_ios17(dtype: str) -> None:
    x = np.array([0, 1.9, 100.5, 7], np.float32)
    assert_same(run("cast", {"x": x}, {"dtype": dtype})[0], x.astype(dtype))
    assert run("cast", {"x": x}, {"dtype": dtype})[0].dtype == np.dtype(dtype)


def test_maximum_and_clip_let_nan_through() -> None:
    x = np.array([np.nan, 1, -1], np.float16)
    assert np.isnan(run("maximum", {"x": x, "y": np.zeros(3, np.float16)})[0][0])
    assert np.isnan(run("clip", {"x": x}, {"alpha": np.float16(0), "beta": np.float16(1)})[0][0])


EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("op", NATIVE_EXACT + NATIVE_NEAR)
def test_an_op_run_in_fp16_equals_fp32_rounded_once_for_every_fp16_number(op: str) -> None:
    entry = TABLE.find(op, 18)
    assert entry is not None and entry.half == "native"
    kernel = entry.make()
    x = torch.from_numpy(EVERY_HALF.copy())
    ours, wide = (
        y.nan_to_num(7).view(torch.int16).int() for y in (kernel(x), kernel(x.float()).half())
    )
    differences = (ours - wide).abs()
    assert differences.max() <= (op in NATIVE_NEAR)
    assert (differences > 0).float().mean() < 1e-3


@pytest.mark.parametrize("op", NATIVE_PAIRS)
def test_a_pair_run_in_fp16_equals_fp32_rounded_once(op: str) -> None:
    entry = TABLE.find(op, 18)
    assert entry is not None
    kernel = entry.make()
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.permutation(EVERY_HALF)) for _ in range(2))
    assert torch.equal(
        kernel(x, y).nan_to_num(7), kernel(x.float(), y.float()).half().nan_to_num(7)
    )


def test_inputs_of_two_element_types_are_refused() -> None:
    x, y = np.ones(2, np.float16), np.ones(2, np.float32)
    with pytest.raises(UserError, match=r"op add.*different element types"):
        run("add", {"x": x, "y": y}, outputs=[TensorType("fp16", (2,))])
