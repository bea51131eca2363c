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

OLD, NEW = ct.target.iOS16, ct.target.iOS17
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
MODES = ("update", "add", "sub", "mul", "div", "max", "min")


def picks(shape: tuple, size: int, seed: int, negative: bool) -> np.ndarray:
    return (
        np.random.default_rng(seed).integers(-size if negative else 0, size, shape).astype(np.int32)
    )


@given(
    case=tensor_and_axis(NUMBERS),
    rank=st.integers(0, 2),
    seed=st.integers(0, 999),
    old=st.booleans(),
)
@QUICK
def test_gather_agrees_with_numpy(
    case: tuple[np.ndarray, int], rank: int, seed: int, old: bool
) -> None:
    x, axis = case
    indices = picks((2, 3)[:rank], x.shape[axis], seed, negative=old)
    expected = np.take(x, indices, axis)
    (out,) = run("gather", {"x": x, "indices": indices}, {"axis": axis}, OLD if old else NEW)
    assert_same(out, np.asarray(expected))


@given(
    batch=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    extra=st.integers(0, 1),
    seed=st.integers(0, 999),
)
@QUICK
def test_gather_with_batch_dims_agrees_with_coremltools(
    batch: list[int], extra: int, seed: int
) -> None:
    x = values((*batch, *[2] * extra, 4, 3), np.float32, seed)
    indices = picks((*batch, 2), 4, seed, negative=False)
    params = {"axis": len(batch) + extra, "batch_dims": len(batch)}
    (expected,) = infer("gather", {"x": x, "indices": indices}, params)
    (out,) = run("gather", {"x": x, "indices": indices}, params)
    assert_same(out, expected)


@given(
    case=tensor_and_axis(NUMBERS),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
    old=st.booleans(),
)
@QUICK
def test_gather_along_axis_agrees_with_numpy(
    case: tuple[np.ndarray, int], count: int, seed: int, old: bool
) -> None:
    x, axis = case
    shape = list(x.shape)
    shape[axis] = count
    indices = picks(tuple(shape), x.shape[axis], seed, negative=old)
    (out,) = run(
        "gather_along_axis", {"x": x, "indices": indices}, {"axis": axis}, OLD if old else NEW
    )
    assert_same(out, np.take_along_axis(x, indices, axis))


@given(x=tensors(NUMBERS, low=2), depth=st.integers(1, 3), seed=st.integers(0, 999))
@QUICK
def test_gather_nd_agrees_with_numpy(x: np.ndarray, depth: int, seed: int) -> None:
    depth = min(depth, x.ndim)
    indices = np.stack(
        [picks((2, 3), size, seed + i, False) for i, size in enumerate(x.shape[:depth])], -1
    )
    (out,) = run("gather_nd", {"x": x, "indices": indices})
    assert_same(out, x[tuple(np.moveaxis(indices, -1, 0))])


@given(seed=st.integers(0, 999), rank=st.integers(1, 2))
@QUICK
def test_gather_nd_with_batch_dims_indexes_within_each_batch(seed: int, rank: int) -> None:
    batch = (2, 3)[:rank]
    x = values((*batch, 4, 5, 2), np.float32, seed)
    indices = np.stack(
        [picks((*batch, 6), size, seed + i, False) for i, size in enumerate((4, 5))], -1
    )
    expected = np.empty((*batch, 6, 2), np.float32)
    for at in np.ndindex(*batch):
        expected[at] = x[at][tuple(indices[at].T)]
    assert_same(run("gather_nd", {"x": x, "indices": indices}, {"batch_dims": rank})[0], expected)


@pytest.mark.parametrize("target, indices", [(OLD, [3]), (OLD, [-4]), (NEW, [3]), (NEW, [-1])])
def test_an_index_out_of_bounds_is_an_error_that_names_the_op(
    target: object, indices: list[int]
) -> None:
    x = values((3, 2), np.float32, 0)
    with pytest.raises(
        UserError, match=r"op gather 'gather' in function 'main'.*out of an axis of size 3"
    ):
        run("gather", {"x": x, "indices": np.array(indices, np.int32)}, {"axis": 0}, target)


@pytest.mark.parametrize(
    "op",
    ["gather", "gather_along_axis", "gather_nd", "scatter", "scatter_along_axis", "scatter_nd"],
)
@pytest.mark.parametrize("index", [-1, 3])
@pytest.mark.parametrize("validated", [True, False])
def test_an_index_out_of_bounds_is_an_error_validated_or_not(
    op: str, index: int, validated: bool
) -> None:
    data = values((3, 2), np.float32, 0)
    shape = (1, 1) if op.endswith("nd") else (1, 2) if "along" in op else (1,)
    tensors = {"indices": np.full(shape, index, np.int32)}
    if op.startswith("scatter"):
        tensors |= {"data": data, "updates": data[:1]}
    else:
        tensors |= {"x": data}
    with pytest.raises(UserError, match=rf"op {op} .*index {index} is out of an axis of size 3"):
        run(op, tensors, {"validate_indices": validated}, NEW)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_gather_takes_small_integers_as_data_and_as_indices(dtype: type) -> None:
    x = np.arange(12).reshape(4, 3).astype(dtype)
    (out,) = run("gather", {"x": x, "indices": np.array([3, 0], dtype)}, {"axis": 0}, NEW)
    assert_same(out, x[[3, 0]])
    assert out.dtype == dtype


@given(case=tensor_and_axis(NUMBERS), seed=st.integers(0, 99))
@QUICK
def test_select_agrees_with_numpy(case: tuple[np.ndarray, int], seed: int) -> None:
    a, _ = case
    b, cond = values(a.shape, a.dtype.type, seed), values(a.shape, np.bool_, seed)
    assert_same(run("select", {"cond": cond, "a": a, "b": b})[0], np.where(cond, a, b))


def combine(data: np.ndarray, where: tuple, updates: np.ndarray, mode: str) -> np.ndarray:
    """One update after another, in order."""
    out = data.astype(np.float64)
    for at in np.ndindex(*updates.shape[:1] if len(where) == 1 else updates.shape):
        index = tuple(axis[at] if isinstance(axis, np.ndarray) else axis for axis in where)
        one = updates[at].astype(np.float64)
        if mode == "update":
            out[index] = one
        elif mode in ("max", "min"):
            out[index] = (np.maximum if mode == "max" else np.minimum)(out[index], one)
        else:
            out[index] = ARITHMETIC[mode](out[index], one)
    return out.astype(data.dtype)


@pytest.mark.parametrize("mode", MODES)
@given(
    case=tensor_and_axis(FLOATS),
    count=st.integers(1, 4),
    seed=st.integers(0, 999),
    old=st.booleans(),
)
@QUICK
def test_scatter_agrees_with_one_update_after_another(
    mode: str, case: tuple[np.ndarray, int], count: int, seed: int, old: bool
) -> None:
    data, axis = case
    indices = picks((count,), data.shape[axis], seed, negative=old)
    shape = list(data.shape)
    shape[axis] = count
    updates = values(tuple(shape), data.dtype.type, seed) + data.dtype.type(3)
    rows = combine(np.moveaxis(data, axis, 0), (indices,), np.moveaxis(updates, axis, 0), mode)
    expected = np.moveaxis(rows, 0, axis)
    (out,) = run(
        "scatter",
        {"data": data, "indices": indices, "updates": updates},
        {"axis": axis, "mode": mode},
        OLD if old else NEW,
    )
    assert_same(out, expected, rtol=1e-4, atol=1e-2 if data.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("mode", MODES)
@given(case=tensor_and_axis(FLOATS), seed=st.integers(0, 999))
@QUICK
def test_scatter_along_axis_agrees_with_one_update_after_another(
    mode: str, case: tuple[np.ndarray, int], seed: int
) -> None:
    data, axis = case
    shape = list(data.shape)
    shape[axis] = 2
    indices = picks(tuple(shape), data.shape[axis], seed, negative=False)
    updates = values(tuple(shape), data.dtype.type, seed) + data.dtype.type(3)
    where = list(np.indices(shape))
    where[axis % data.ndim] = indices
    expected = combine(data, tuple(where), updates, mode)
    (out,) = run(
        "scatter_along_axis",
        {"data": data, "indices": indices, "updates": updates},
        {"axis": axis, "mode": mode},
    )
    assert_same(out, expected, rtol=1e-4, atol=1e-2 if data.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 2])
def test_scatter_nd_agrees_with_one_update_after_another(mode: str, depth: int) -> None:
    data = values((4, 5, 2), np.float32, 0)
    indices = np.stack([picks((6,), size, i, False) for i, size in enumerate((4, 5)[:depth])], -1)
    updates = values((6, *data.shape[depth:]), np.float32, 1) + np.float32(3)
    expected = data.astype(np.float64)
    for index, update in zip(indices, updates, strict=True):
        expected[tuple(index)] = combine(
            expected[tuple(index)][None], (np.array([0]),), update[None], mode
        )[0]
    (out,) = run(
        "scatter_nd", {"data": data, "indices": indices, "updates": updates}, {"mode": mode}
    )
    assert_same(out, expected.astype(np.float32), rtol=1e-4, atol=1e-5)


def test_scatters_of_integers_stay_integers_and_leave_their_input_alone() -> None:
    data, indices = np.arange(6, dtype=np.int32), np.array([1, 1, 4], np.int32)
    updates = np.array([10, 20, 3], np.int32)
    (out,) = run(
        "scatter",
        {"data": data, "indices": indices, "updates": updates},
        {"axis": 0, "mode": "add"},
    )
    assert out.tolist() == [0, 31, 2, 3, 7, 5] and data.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(
        torch.from_numpy(data).index_add(0, torch.tensor([1, 1, 4]), torch.from_numpy(updates)),
        torch.from_numpy(out),
    )


def test_an_empty_set_of_indices_gathers_nothing() -> None:
    x = values((3, 2), np.float32, 0)
    (out,) = run(
        "gather",
        {"x": x, "indices": np.zeros(0, np.int32)},
        {"axis": 0},
        outputs=[TensorType("fp32", (0, 2))],
    )
    assert out.shape == (0, 2)
