import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from op_harness import assert_same, infer, run
from strategies import FLOATS, QUICK, tensors

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softsign": F.softsign,
    "softplus": F.softplus,
}
WITH_CONSTANTS = {
    "clamped_relu": {"alpha": 0.1, "beta": 0.8},
    "elu": {"alpha": 0.7},
    "leaky_relu": {"alpha": 0.2},
    "linear_activation": {"alpha": 2.0, "beta": -0.5},
    "scaled_tanh": {"alpha": 1.5, "beta": 0.5},
    "sigmoid_hard": {"alpha": 0.2, "beta": 0.5},
    "thresholded_relu": {"alpha": 0.5},
}


def by_torch(function: object, x: np.ndarray) -> np.ndarray:
    return function(torch.from_numpy(x).float()).numpy().astype(x.dtype)  # type: ignore[operator]


@pytest.mark.parametrize("op", sorted(TORCH))
@given(x=tensors(FLOATS, smallest=0))
@QUICK
def test_an_activation_agrees_with_pytorch(op: str, x: np.ndarray) -> None:
    assert_same(run(op, {"x": x})[0], by_torch(TORCH[op], x), rtol=1e-5)


@pytest.mark.parametrize("op", sorted(WITH_CONSTANTS))
@given(x=tensors(FLOATS))
@QUICK
def test_an_activation_with_constants_agrees_with_coremltools(op: str, x: np.ndarray) -> None:
    params = {name: x.dtype.type(value) for name, value in WITH_CONSTANTS[op].items()}
    wide = {name: np.float32(value) for name, value in params.items()}
    (expected,) = infer(op, {"x": x.astype(np.float32)}, wide)
    assert_same(run(op, {"x": x}, params)[0], expected.astype(x.dtype), rtol=1e-5)


@given(x=tensors(FLOATS))
@QUICK
def test_each_mode_of_gelu_is_its_own_function(x: np.ndarray) -> None:
    expected = {
        "EXACT": F.gelu,
        "TANH_APPROXIMATION": lambda t: F.gelu(t, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda t: t * torch.sigmoid(1.702 * t),
    }
    for mode, function in expected.items():
        assert_same(run("gelu", {"x": x}, {"mode": mode})[0], by_torch(function, x), rtol=1e-5)
    assert_same(run("gelu", {"x": x})[0], by_torch(F.gelu, x), rtol=1e-5)


@given(x=tensors((np.float32,), low=3, high=3))
@QUICK
def test_parametric_activations_take_one_constant_per_channel(x: np.ndarray) -> None:
    channels = x.shape[1]
    alpha = np.full(channels, 0.3, np.float32)
    beta = np.linspace(0.5, 1, channels).astype(np.float32)
    column = (1, channels, 1)
    assert_same(
        run("prelu", {"x": x}, {"alpha": alpha})[0], np.where(x > 0, x, alpha.reshape(column) * x)
    )
    expected = alpha.reshape(column) * np.log1p(np.exp(x * beta.reshape(column)))
    assert_same(
        run("softplus_parametric", {"x": x}, {"alpha": alpha, "beta": beta})[0], expected, rtol=1e-5
    )


def test_softplus_and_silu_do_not_overflow() -> None:
    x = np.array([-1000, -30, 30, 1000], np.float32)
    assert_same(
        run("softplus", {"x": x})[0], np.array([0, np.exp(-30), 30, 1000], np.float32), atol=1e-12
    )
    assert_same(
        run("silu", {"x": x})[0], np.array([0, -30 * np.exp(-30), 30, 1000], np.float32), atol=1e-12
    )
