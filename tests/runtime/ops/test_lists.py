"""Lists of tensors, through packages that coremltools writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from ane_moe.runtime.reference.lists import MAX_LENGTH, TensorList
from tests.runtime.saved_program import saved

Predict = Callable[..., dict[str, np.ndarray]]


def loaded(program: Any, path: Path) -> Predict:
    function = load_package(saved(program, path), runtime="reference")
    return lambda **inputs: function.predict(inputs)


def test_writes_make_a_list_longer_and_what_was_not_written_is_zero(tmp_path: Path) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec((2,)), mb.TensorSpec((2, 2))], opset_version=ct.target.iOS17
    )
    def program(a, rows):
        empty = mb.make_list(init_length=2, elem_shape=(2,))
        once = mb.list_write(ls=empty, index=4, value=a)
        both = mb.list_scatter(ls=once, indices=[2, 1], value=rows)
        whole = mb.list_gather(ls=both, indices=[0, 1, 2, 3, 4])
        return (
            mb.identity(x=whole, name="whole"),
            mb.list_length(ls=both, name="length"),
            mb.list_read(ls=once, index=2, name="before"),
            mb.list_read(ls=empty, index=1, name="first"),
        )

    predict = loaded(program, tmp_path / "list.mlpackage")
    a, rows = np.array([2, 4], np.float32), np.array([[-1, -2], [-4, -5]], np.float32)
    for _ in range(2):  # a second call starts afresh
        out = predict(a=a, rows=rows)
        assert out["whole"].tolist() == [[0, 0], [-4, -5], [-1, -2], [0, 0], [2, 4]]
        assert out["length"] == 5
        assert out["before"].tolist() == [0, 0] and out["first"].tolist() == [0, 0]
        out["first"] += 9
    assert a.tolist() == [2, 4]


def test_a_loop_that_fills_a_list_step_by_step_is_a_running_sum(tmp_path: Path) -> None:
    """The form in which coremltools writes TensorFlow's dynamic recurrent layers."""

    @mb.program(
        input_specs=[mb.TensorSpec((6, 3)), mb.TensorSpec((1,), dtype=types.int32)],
        opset_version=ct.target.iOS17,
    )
    def program(x, steps):
        def body(i, total, ls):
            total = mb.add(x=total, y=mb.gather(x=x, indices=i, axis=0))
            return mb.add(x=i, y=1), total, mb.list_write(ls=ls, index=i, value=total)

        last = mb.squeeze(x=steps)
        start = mb.sub(x=last, y=last)
        _, _, filled = mb.while_loop(
            _cond=lambda i, total, ls: mb.less(x=i, y=last),
            _body=body,
            loop_vars=(
                start,
                np.zeros(3, np.float32),
                mb.make_list(init_length=1, elem_shape=(3,)),
            ),
        )
        return mb.list_gather(
            ls=filled, indices=mb.range_1d(start=0, end=mb.list_length(ls=filled), step=1)
        )

    predict = loaded(program, tmp_path / "loop.mlpackage")
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for count in (1, 4, 6):
        (out,) = predict(x=x, steps=np.array([count], np.int32)).values()
        np.testing.assert_allclose(out, np.cumsum(x[:count], 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_a_list_is_an_error_that_names_the_op(tmp_path: Path, index: int) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec((2,)), mb.TensorSpec((1,), dtype=types.int32)],
        opset_version=ct.target.iOS17,
    )
    def program(a, i):
        ls = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(2,)), index=0, value=a)
        return mb.list_read(ls=ls, index=mb.squeeze(x=i))

    predict = loaded(program, tmp_path / "read.mlpackage")
    with pytest.raises(
        UserError, match=rf"op list_read 'list_read_0' in function 'main': .*index {index} of 2"
    ):
        predict(a=np.zeros(2, np.float32), i=np.array([index], np.int32))


def test_a_list_refuses_what_does_not_fit() -> None:
    two = torch.zeros(2)
    fixed, growing = (
        TensorList(torch.float32, None, grows, (None, None)) for grows in (False, True)
    )
    with pytest.raises(UserError, match=r"writes outside a list; found: index 2 to 2 of 2"):
        fixed.write([2], [two])
    with pytest.raises(UserError, match="writes outside a list"):
        growing.write([MAX_LENGTH], [two])
    with pytest.raises(UserError, match="of unknown shape that nothing was written to"):
        growing.read(0)
    written = growing.write([0], [two])
    assert written.read(1).tolist() == [0, 0] and growing.elements == (None, None)
    with pytest.raises(
        UserError, match=r"another type than the list's; found: torch.float32 \[3\] for .*\[2\]"
    ):
        written.write([1], [torch.zeros(3)])
    with pytest.raises(UserError, match="another type than the list's"):
        written.write([1], [two.half()])
    with pytest.raises(UserError, match="another number of values than of indices"):
        written.write([0, 1], [two])
