import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, infer, run
from strategies import FLOATS, QUICK, tensor_and_axes, tensors, values

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@given(case=tensor_and_axes(FLOATS), affine=st.booleans(), seed=st.integers(0, 99))
@QUICK
def test_layer_norm_agrees_with_coremltools(
    case: tuple[np.ndarray, list[int]], affine: bool, seed: int
) -> None:
    x, axes = case
    params: dict = {"axes": axes, "epsilon": x.dtype.type(1e-3)}
    if affine:
        shape = tuple(x.shape[axis] for axis in sorted(axis % x.ndim for axis in axes))
        params |= {
            "gamma": values(shape, x.dtype.type, seed),
            "beta": values(shape, x.dtype.type, seed + 1),
        }
    wide = {name: np.float32(value) if name != "axes" else value for name, value in params.items()}
    (expected,) = infer("layer_norm", {"x": x.astype(np.float32)}, wide)
    assert_same(
        run("layer_norm", {"x": x}, params)[0], expected.astype(x.dtype), rtol=2e-3, atol=2e-3
    )


def test_layer_norm_over_the_last_axis_agrees_with_pytorch() -> None:
    x, gamma, beta = (
        values((2, 3, 8), np.float32, 0),
        values((8,), np.float32, 1),
        values((8,), np.float32, 2),
    )
    expected = F.layer_norm(
        *(torch.from_numpy(x), (8,), torch.from_numpy(gamma), torch.from_numpy(beta)), 1e-6
    )
    params = {"axes": [-1], "gamma": gamma, "beta": beta, "epsilon": np.float32(1e-6)}
    assert_same(run("layer_norm", {"x": x}, params)[0], expected.numpy(), **CLOSE)


@given(
    x=tensors((np.float32,), low=3, high=5, smallest=2),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
@QUICK
def test_batch_and_instance_norm_agree_with_pytorch(x: np.ndarray, affine: bool, seed: int) -> None:
    channels = x.shape[1]
    mean, variance = (
        values((channels,), np.float32, seed),
        abs(values((channels,), np.float32, seed + 1)),
    )
    scale = {
        "gamma": values((channels,), np.float32, seed + 2),
        "beta": values((channels,), np.float32, seed + 3),
    }
    params = scale if affine else {}
    wide = [torch.from_numpy(scale[name]) if affine else None for name in ("gamma", "beta")]
    tensor = torch.from_numpy(x)
    expected = F.batch_norm(
        tensor, torch.from_numpy(mean), torch.from_numpy(variance), *wide, eps=1e-5
    ).numpy()
    given_ = {"mean": mean, "variance": variance, **params, "epsilon": np.float32(1e-5)}
    assert_same(run("batch_norm", {"x": x}, given_)[0], expected, **CLOSE)
    if x.ndim < 5:
        instance = F.instance_norm(tensor, None, None, *wide, eps=1e-5).numpy()
        assert_same(
            run("instance_norm", {"x": x}, {**params, "epsilon": np.float32(1e-5)})[0],
            instance,
            **CLOSE,
        )


@given(x=tensors((np.float32,), low=3, high=5))
@QUICK
def test_l2_norm_agrees_with_coremltools(x: np.ndarray) -> None:
    (expected,) = infer("l2_norm", {"x": x}, {"epsilon": np.float32(1e-3)})
    assert_same(run("l2_norm", {"x": x}, {"epsilon": np.float32(1e-3)})[0], expected, **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rank", [3, 4])
def test_local_response_norm_agrees_with_pytorch(size: int, rank: int) -> None:
    x = values((2, 6, 3, 4)[:rank], np.float32, 0)
    params = {"size": size, "alpha": np.float32(0.1), "beta": np.float32(0.6), "k": np.float32(1.5)}
    expected = F.local_response_norm(torch.from_numpy(x), size, 0.1, 0.6, 1.5).numpy()
    assert_same(run("local_response_norm", {"x": x}, params)[0], expected, **CLOSE)


def test_normalising_in_fp16_precision_overflows_where_squares_do() -> None:
    x = np.array([[300.0, -300.0, 300.0, -300.0]], np.float16)
    params = {"axes": [-1], "epsilon": np.float16(1e-5)}
    assert_same(run("layer_norm", {"x": x}, params)[0], np.sign(x))
    assert_same(
        run("layer_norm", {"x": x}, params, precision="fp16")[0], np.zeros_like(x)
    )  # 1 / sqrt(inf)
