"""RmsNorm against the plain formula in double precision, over the whole range of fp16."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.parts.norm import RmsNorm

CHANNELS = 48


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float, axis: int) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(axis, keepdim=True) + eps).sqrt() * weight.double()


def half_steps(norm: RmsNorm, x: torch.Tensor) -> torch.Tensor:
    """The block as an engine runs it: every value rounded to fp16."""
    with torch.no_grad():
        return norm.half()(x.half())


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@settings(deadline=None, max_examples=60)
@given(exponent=st.floats(-6, 4.4), outlier=st.floats(1, 30), seed=st.integers(0, 2**31))
def test_rms_norm_equals_the_formula_wherever_fp16_reaches(axis, eps, exponent, outlier, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [1, CHANNELS, 1, 3] if axis == 1 else [1, 2, CHANNELS, 3]
    x = (torch.randn(shape, generator=generator) * 10**exponent).clamp(
        -60_000 / outlier, 60_000 / outlier
    )
    x.select(axis, 0).mul_(outlier)
    x = x.half().float()
    norm = RmsNorm(CHANNELS, eps, axis)
    norm.weight.data = (
        (1 + 0.3 * torch.randn(norm.weight.shape, generator=generator)).half().float()
    )
    expected = exact(x, norm.weight.data, eps, axis)
    result = half_steps(norm, x).double()
    assert torch.isfinite(result).all()
    # Five roundings of 2^-11 each; below 1e-4 the input itself has only a few bits left.
    tolerance = 0.004 * expected.abs().max().clamp(min=1e-3)
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=float(tolerance))


def test_the_squares_of_large_inputs_do_not_overflow():
    norm = RmsNorm(CHANNELS, 1e-6)
    torch.nn.init.ones_(norm.weight)
    x = torch.full((1, CHANNELS, 1, 1), 60_000.0)
    torch.testing.assert_close(half_steps(norm, x), torch.ones_like(x).half())


def test_eps_decides_for_small_inputs():
    norm = RmsNorm(CHANNELS, 1e-6)
    torch.nn.init.ones_(norm.weight)
    x = torch.full((1, CHANNELS, 1, 1), 1e-3)  # its square equals eps
    torch.testing.assert_close(
        half_steps(norm, x).float(), torch.full_like(x, 0.5**0.5), atol=2e-3, rtol=0
    )


def test_zeros_stay_zero():
    norm = RmsNorm(CHANNELS, 1e-6)
    torch.nn.init.ones_(norm.weight)
    assert not half_steps(norm, torch.zeros(1, CHANNELS, 1, 2)).any()
