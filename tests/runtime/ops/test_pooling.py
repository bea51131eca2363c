import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from op_harness import assert_same, run
from strategies import QUICK, values

AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@st.composite
def pools(draw: st.DrawFn, ranks: tuple = (1, 2, 3)) -> tuple[np.ndarray, dict, int]:
    rank = draw(st.sampled_from(ranks))
    kernel = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    half = [draw(st.integers(0, k // 2)) for k in kernel]  # PyTorch pads by at most half the window
    sizes = [k + draw(st.integers(0, 4)) for k in kernel]
    x = values((2, 3, *sizes), np.float32, draw(st.integers(0, 999)))
    strides = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    pad = [side for amount in half for side in (amount, amount)]
    return x, {"kernel_sizes": kernel, "strides": strides, "pad_type": "custom", "pad": pad}, rank


def torch_arguments(params: dict) -> tuple:
    return params["kernel_sizes"], params["strides"], params["pad"][::2]


@given(case=pools(), exclude=st.booleans())
@QUICK
def test_avg_pool_agrees_with_pytorch(case: tuple[np.ndarray, dict, int], exclude: bool) -> None:
    x, params, rank = case
    expected = AVERAGE[rank](
        torch.from_numpy(x), *torch_arguments(params), count_include_pad=not exclude
    ).numpy()
    assert_same(
        run("avg_pool", {"x": x}, {**params, "exclude_padding_from_average": exclude})[0],
        expected,
        1e-5,
        1e-5,
    )


@given(case=pools())
@QUICK
def test_max_pool_agrees_with_pytorch(case: tuple[np.ndarray, dict, int]) -> None:
    x, params, rank = case
    expected = MAXIMUM[rank](torch.from_numpy(x), *torch_arguments(params)).numpy()
    assert_same(run("max_pool", {"x": x}, params)[0], expected)


@given(case=pools((1, 2)), exclude=st.booleans())
@QUICK
def test_ceil_mode_agrees_with_pytorch_where_both_define_it(
    case: tuple[np.ndarray, dict, int], exclude: bool
) -> None:
    x, params, rank = case
    arguments = torch_arguments(params)
    expected = MAXIMUM[rank](torch.from_numpy(x), *arguments, ceil_mode=True).numpy()
    # Without padding the documentation keeps a last window that would start past the data; PyTorch
    # drops it.
    assume(
        all(
            size + 2 * p > (count - 1) * s or p
            for size, p, s, count in zip(
                x.shape[2:],
                arguments[2],
                arguments[1],
                [
                    -(-(n + 2 * p - k) // s) + 1
                    for n, p, k, s in zip(x.shape[2:], arguments[2], *arguments[:2], strict=True)
                ],
                strict=True,
            )
        )
    )
    assert_same(run("max_pool", {"x": x}, {**params, "ceil_mode": True})[0], expected)
    mean = AVERAGE[rank](
        torch.from_numpy(x), *arguments, ceil_mode=True, count_include_pad=not exclude
    ).numpy()
    assert_same(
        run(
            "avg_pool",
            {"x": x},
            {**params, "ceil_mode": True, "exclude_padding_from_average": exclude},
        )[0],
        mean,
        1e-5,
        1e-5,
    )


@given(case=pools((1, 2)))
@QUICK
def test_l2_pool_is_the_norm_of_each_window(case: tuple[np.ndarray, dict, int]) -> None:
    x, params, rank = case
    kernel, strides, pad = torch_arguments(params)
    wide = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in pad)])
    tensor = torch.from_numpy(wide)
    expected = (
        F.lp_pool1d(tensor, 2.0, kernel[0], strides[0])
        if rank == 1
        else F.lp_pool2d(tensor, 2.0, tuple(kernel), tuple(strides))
    )
    assert_same(run("l2_pool", {"x": x}, params)[0], expected.numpy(), 1e-4, 1e-4)


@pytest.mark.parametrize(
    "kind, target", [("same", ct.target.iOS15), ("same_lower", ct.target.iOS16)]
)
def test_same_padding_of_a_pool_puts_the_odd_element_where_it_says(
    kind: str, target: object
) -> None:
    x = np.arange(1.0, 6).reshape(1, 1, 5).astype(np.float32)
    params = {"kernel_sizes": [2], "strides": [1], "pad_type": kind}
    expected = [2, 3, 4, 5, 5] if kind == "same" else [1, 2, 3, 4, 5]
    assert run("max_pool", {"x": x}, params, target)[0].ravel().tolist() == expected


def test_valid_padding_is_no_padding() -> None:
    x = values((1, 2, 7), np.float16, 0)
    (out,) = run("avg_pool", {"x": x}, {"kernel_sizes": [3], "strides": [2], "pad_type": "valid"})
    expected = F.avg_pool1d(torch.from_numpy(x.astype(np.float32)), 3, 2).numpy().astype(np.float16)
    assert_same(out, expected)
