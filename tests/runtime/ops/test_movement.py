import coremltools as ct
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from op_harness import assert_same, infer, run
from strategies import NUMBERS, QUICK, tensor_and_axes, tensor_and_axis, tensors, values

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType

ALL = (*NUMBERS, np.bool_)


@given(x=tensors(ALL), seed=st.integers(0, 99))
@QUICK
def test_reshape_agrees_with_numpy(x: np.ndarray, seed: int) -> None:
    flat = [x.size]
    assert_same(run("reshape", {"x": x}, {"shape": flat})[0], x.reshape(flat))
    shape = [*x.shape[::-1]]
    shape[seed % len(shape)] = -1
    assert_same(run("reshape", {"x": x}, {"shape": shape})[0], x.reshape(x.shape[::-1]))


def test_a_zero_in_a_shape_keeps_the_dimension_at_equal_rank() -> None:
    x = values((2, 3, 4), np.float32, 0)
    (out,) = run(
        "reshape", {"x": x}, {"shape": [0, -1, 2]}, outputs=[TensorType("fp32", (2, 6, 2))]
    )
    assert_same(out, x.reshape(2, 6, 2))
    empty = np.zeros((0, 3), np.float32)
    (out,) = run(
        "reshape", {"x": empty}, {"shape": [3, 0, 1]}, outputs=[TensorType("fp32", (3, 0, 1))]
    )
    assert out.shape == (3, 0, 1)


@pytest.mark.parametrize(
    "given_shape, shape, expected",
    [
        ((2, 50), [1, 0, -1, 0], (1, 1, 2, 50)),  # the example of the documentation
        ((2, 3, 4), [0, -1], (3, 8)),
        ((2, 3, 4), [-1, 0], (6, 4)),
        ((6,), [0, 2, -1], (1, 2, 3)),
    ],
)
def test_from_ios_17_a_zero_keeps_the_dimension_counted_from_the_right(
    given_shape: tuple, shape: list, expected: tuple
) -> None:
    x = values(given_shape, np.float32, 0)
    (theirs,) = infer("reshape", {"x": x}, {"shape": shape}, ct.target.iOS17)
    assert theirs.shape == expected
    assert_same(run("reshape", {"x": x}, {"shape": shape}, ct.target.iOS17)[0], theirs)
    with pytest.raises(UserError, match="op reshape"):
        run(
            "reshape",
            {"x": x},
            {"shape": shape},
            ct.target.iOS16,
            outputs=[TensorType("fp32", expected)],
        )


@pytest.mark.parametrize("shape", [[0], [0, 4, 2]])
def test_an_empty_tensor_keeps_its_zeros_at_another_rank(shape: list) -> None:
    x = np.zeros((0, 8), np.float32)
    (out,) = run("reshape", {"x": x}, {"shape": shape}, outputs=[TensorType("fp32", tuple(shape))])
    assert out.shape == tuple(shape)


@given(x=tensors(ALL, smallest=0), seed=st.integers(0, 999))
@QUICK
def test_transpose_agrees_with_numpy(x: np.ndarray, seed: int) -> None:
    perm = np.random.default_rng(seed).permutation(x.ndim)
    assert_same(run("transpose", {"x": x}, {"perm": perm.tolist()})[0], x.transpose(perm))
    negative = [axis - x.ndim for axis in perm.tolist()]
    assert_same(run("transpose", {"x": x}, {"perm": negative})[0], x.transpose(perm))


@given(case=tensor_and_axes(ALL))
@QUICK
def test_expand_dims_and_squeeze_undo_each_other(case: tuple[np.ndarray, list[int]]) -> None:
    x, axes = case
    assume(len({axis % (x.ndim + len(axes)) for axis in axes}) == len(axes))
    (expanded,) = run("expand_dims", {"x": x}, {"axes": axes})
    assert_same(expanded, np.expand_dims(x, tuple(axes)))
    (back,) = run("squeeze", {"x": expanded}, {"axes": axes})
    assert_same(back, x)


def test_squeeze_without_axes_drops_every_dimension_of_one_and_refuses_others() -> None:
    x = values((1, 3, 1), np.float32, 0)
    assert_same(run("squeeze", {"x": x})[0], x.squeeze())
    with pytest.raises(UserError, match=r"op squeeze.*cannot squeeze"):
        run("squeeze", {"x": x}, {"axes": [1]}, outputs=[TensorType("fp32", (1, 3, 1))])


@given(x=tensors(ALL), axis=st.integers(-4, 4))
@QUICK
def test_flatten2d_agrees_with_coremltools(x: np.ndarray, axis: int) -> None:
    assume(-x.ndim <= axis <= x.ndim)
    expected = x.reshape(int(np.prod(x.shape[:axis])), -1)
    (out,) = run(
        "flatten2d", {"x": x}, {"axis": axis}, outputs=[TensorType(_name(x), expected.shape)]
    )
    assert_same(out, expected)


@given(case=tensor_and_axis(ALL), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@QUICK
def test_concat_and_split_undo_each_other(case: tuple[np.ndarray, int], sizes: list[int]) -> None:
    x, axis = case
    parts = [np.repeat(np.take(x, [0], axis), size, axis) for size in sizes]
    whole = np.concatenate(parts, axis)
    assert_same(run("concat", {"values": parts}, {"axis": axis})[0], whole)
    if len(sizes) > 1:
        for ours, part in zip(
            run("split", {"x": whole}, {"axis": axis, "split_sizes": sizes}), parts, strict=True
        ):
            assert_same(ours, part)


@given(case=tensor_and_axis(NUMBERS), count=st.integers(2, 4))
@QUICK
def test_interleaved_concat_takes_turns(case: tuple[np.ndarray, int], count: int) -> None:
    x, axis = case
    parts = [x + i for i in range(count)]
    at = axis % x.ndim
    shape = list(x.shape)
    shape[at] *= count
    expected = np.stack(parts, at + 1).reshape(shape)
    assert_same(run("concat", {"values": parts}, {"axis": axis, "interleave": True})[0], expected)


@given(case=tensor_and_axis(ALL), count=st.integers(1, 3))
@QUICK
def test_stack_and_even_split_agree_with_numpy(case: tuple[np.ndarray, int], count: int) -> None:
    x, axis = case
    assert_same(
        run("stack", {"values": [x] * count}, {"axis": axis})[0], np.stack([x] * count, axis)
    )
    if count > 1:
        whole = np.concatenate([x] * count, axis)
        for part in run("split", {"x": whole}, {"axis": axis, "num_splits": count}):
            assert_same(part, x)


@given(x=tensors(ALL), seed=st.integers(0, 999))
@QUICK
def test_tile_agrees_with_numpy(x: np.ndarray, seed: int) -> None:
    reps = np.random.default_rng(seed).integers(1, 3, x.ndim).tolist()
    assert_same(run("tile", {"x": x}, {"reps": reps})[0], np.tile(x, reps))


@given(case=tensor_and_axes(ALL))
@QUICK
def test_reverse_agrees_with_numpy(case: tuple[np.ndarray, list[int]]) -> None:
    x, axes = case
    assert_same(run("reverse", {"x": x}, {"axes": axes})[0], np.flip(x, axes))
    assert_same(run("reverse", {"x": x})[0], np.flip(x))


def test_shape_gives_the_dimensions() -> None:
    assert run("shape", {"x": np.zeros((2, 0, 5), np.float16)})[0].tolist() == [2, 0, 5]


@st.composite
def slices(draw: st.DrawFn) -> tuple[np.ndarray, dict]:
    x = draw(tensors(ALL))
    names = ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")
    params: dict[str, list] = {name: [] for name in names}
    for size in x.shape:
        params["begin"].append(draw(st.integers(-size, size - 1)))
        params["end"].append(draw(st.integers(-size - 1, size + 1)))
        params["stride"].append(draw(st.sampled_from([1, 1, 2, 3, -1, -2])))
        params["begin_mask"].append(draw(st.booleans()))
        params["end_mask"].append(draw(st.booleans()))
        params["squeeze_mask"].append(draw(st.integers(0, 3)) == 0)
    return x, params


def chosen(x: np.ndarray, params: dict) -> tuple:
    """The numpy index that the parameters spell."""
    index: list = []
    for begin, end, stride, no_begin, no_end, squeeze in zip(*params.values(), strict=True):
        if squeeze:
            index.append(0 if no_begin else begin)
        else:
            index.append(slice(None if no_begin else begin, None if no_end else end, stride))
    return tuple(index)


def _name(x: np.ndarray) -> str:
    return {"float16": "fp16", "float32": "fp32", "int32": "int32", "bool": "bool"}[x.dtype.name]


@given(case=slices())
@QUICK
def test_slice_by_index_follows_numpy_with_its_masks_and_strides(
    case: tuple[np.ndarray, dict],
) -> None:
    x, params = case
    expected = np.asarray(x[chosen(x, params)])
    (out,) = run("slice_by_index", {"x": x}, params, outputs=[TensorType(_name(x), expected.shape)])
    assert_same(out, expected)


@given(case=slices(), seed=st.integers(0, 99))
@QUICK
def test_slice_update_writes_where_slice_by_index_reads(
    case: tuple[np.ndarray, dict], seed: int
) -> None:
    x, params = case
    expected = x.copy()
    update = values(np.asarray(x[chosen(x, params)]).shape, x.dtype.type, seed)
    expected[chosen(x, params)] = update
    (out,) = run(
        "slice_update", {"x": x, "update": update}, params, outputs=[TensorType(_name(x), x.shape)]
    )
    assert_same(out, expected)
    assert not np.shares_memory(out, x)


def test_slice_update_leaves_its_input_alone() -> None:
    x = np.zeros((2, 3), np.float32)
    run(
        "slice_update",
        {"x": x, "update": np.ones((1, 3), np.float32)},
        {"begin": [0, 0], "end": [1, 3]},
    )
    assert not x.any()


@given(x=tensors(ALL), seed=st.integers(0, 999))
@QUICK
def test_slice_by_size_agrees_with_numpy(x: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    begin = [int(rng.integers(0, size)) for size in x.shape]
    size = [
        -1 if rng.random() < 0.3 else int(rng.integers(1, n - b + 1))
        for n, b in zip(x.shape, begin, strict=True)
    ]
    expected = x[
        tuple(slice(b, None if s == -1 else b + s) for b, s in zip(begin, size, strict=True))
    ]
    assert_same(run("slice_by_size", {"x": x}, {"begin": begin, "size": size})[0], expected)


@pytest.mark.parametrize(
    "params", [{"begin": [1, 0], "end": [2, 3]}, {"begin": [0, -2], "end": [-1, 3]}]
)
def test_a_slice_can_be_computed_by_the_program(params: dict) -> None:
    x = values((3, 3), np.float32, 0)
    computed = {name: np.array(value, np.int32) for name, value in params.items()}
    (out,) = run("slice_by_index", {"x": x, **computed}, outputs=[TensorType("fp32", (None, None))])
    assert_same(out, x[tuple(slice(b, e) for b, e in zip(*params.values(), strict=True))])


@given(x=tensors((np.float32, np.int32), low=2), lower=st.integers(-1, 3), upper=st.integers(-1, 3))
@QUICK
def test_band_part_agrees_with_coremltools(x: np.ndarray, lower: int, upper: int) -> None:
    (expected,) = infer("band_part", {"x": x}, {"lower": lower, "upper": upper})
    assert_same(run("band_part", {"x": x}, {"lower": lower, "upper": upper})[0], expected)


def test_crop_takes_off_the_borders() -> None:
    x = values((1, 2, 6, 7), np.float32, 0)
    (out,) = run("crop", {"x": x}, {"crop_height": [1, 2], "crop_width": [0, 3]})
    assert_same(out, x[:, :, 1:-2, :-3])


@pytest.mark.parametrize("seq_axis, batch_axis", [(1, 0), (0, 1), (2, 0), (-1, 1)])
def test_reverse_sequence_turns_the_front_of_each_row(seq_axis: int, batch_axis: int) -> None:
    x = values((4, 4, 4), np.float32, 0)
    lengths = np.array([0, 1, 3, 4], np.int32)
    expected = x.copy()
    for row, length in enumerate(lengths):
        at: list = [slice(None)] * 3
        at[batch_axis] = row
        rest = np.moveaxis(expected[tuple(at)], (seq_axis % 3) - (seq_axis % 3 > batch_axis), 0)
        rest[:length] = rest[:length][::-1].copy()
    (out,) = run(
        "reverse_sequence",
        {"x": x, "lengths": lengths},
        {"seq_axis": seq_axis, "batch_axis": batch_axis},
    )
    assert_same(out, expected)


@given(case=tensor_and_axis(NUMBERS), size=st.integers(1, 4), stride=st.integers(1, 3))
@QUICK
def test_sliding_windows_agree_with_numpy(
    case: tuple[np.ndarray, int], size: int, stride: int
) -> None:
    x, axis = case
    at = axis % x.ndim
    assume(size <= x.shape[at])
    windows = np.lib.stride_tricks.sliding_window_view(x, size, at)
    expected = np.moveaxis(
        np.take(windows, np.arange(0, windows.shape[at], stride), at), -1, at + 1
    )
    assert_same(
        run("sliding_windows", {"x": x}, {"axis": axis, "size": size, "stride": stride})[0],
        expected,
    )


def test_reshape_like_takes_dimensions_from_its_references() -> None:
    x = values((2, 3, 4, 5, 6), np.float32, 0)
    references = [np.zeros((2, 3, 20), np.float32), np.zeros((1, 6), np.int32)]
    params = {"begins": (0, 1), "ends": (3, 0), "end_masks": (False, True)}
    (out,) = run(
        "reshape_like",
        {"x": x, "ref_tensors": references},
        params,
        outputs=[TensorType("fp32", (2, 3, 20, 6))],
    )
    assert_same(out, x.reshape(2, 3, 20, 6))
