import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, declare, run
from strategies import QUICK, values

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> dict:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return {
        "rank": rank,
        "groups": groups,
        "kernel": kernel,
        "dilations": dilations,
        "strides": draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)),
        "pad": draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank)),
        "sizes": [s + draw(st.integers(0, 3)) for s in span],
        "batch": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def tensors_of(case: dict, transposed: bool = False) -> tuple[np.ndarray, dict]:
    channels, out = 4, 8
    x = values((case["batch"], channels, *case["sizes"]), np.float32, case["seed"])
    shape = (channels, out // case["groups"]) if transposed else (out, channels // case["groups"])
    params = {
        "weight": values((*shape, *case["kernel"]), np.float32, case["seed"] + 1),
        "groups": case["groups"],
        "strides": case["strides"],
        "dilations": case["dilations"],
    }
    if case["bias"]:
        params["bias"] = values((out,), np.float32, case["seed"] + 2)
    return x, params


def padded(x: np.ndarray, pairs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.from_numpy(np.pad(x, [(0, 0), (0, 0), *pairs]))


def torch_conv(x: torch.Tensor, params: dict) -> np.ndarray:
    bias = params.get("bias")
    return CONV[x.dim() - 2](
        x,
        torch.from_numpy(params["weight"]),
        None if bias is None else torch.from_numpy(bias),
        params["strides"],
        0,
        params["dilations"],
        params["groups"],
    ).numpy()


@given(case=convolutions())
@QUICK
def test_conv_with_custom_padding_agrees_with_pytorch(case: dict) -> None:
    x, params = tensors_of(case)
    pairs = list(zip(case["pad"][::2], case["pad"][1::2], strict=True))
    (out,) = run("conv", {"x": x}, {**params, "pad_type": "custom", "pad": case["pad"]})
    assert_same(out, torch_conv(padded(x, pairs), params), rtol=1e-4, atol=1e-5)


@given(case=convolutions(), kind=st.sampled_from(["same", "same_lower"]))
@QUICK
def test_conv_with_same_padding_gives_the_input_size_over_the_stride(case: dict, kind: str) -> None:
    x, params = tensors_of(case)
    pairs = []
    for size, k, d, s in zip(
        case["sizes"], case["kernel"], case["dilations"], case["strides"], strict=True
    ):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        pairs.append(
            (total // 2, total - total // 2) if kind == "same" else (total - total // 2, total // 2)
        )
    (out,) = run("conv", {"x": x}, {**params, "pad_type": kind})
    assert out.shape[2:] == tuple(
        -(-size // s) for size, s in zip(case["sizes"], case["strides"], strict=True)
    )
    assert_same(out, torch_conv(padded(x, pairs), params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_pointwise_conv_is_the_same_convolution(batch: int, shape: tuple, dtype: type) -> None:
    x = values((batch, 6, *shape), dtype, 0)
    params = {"weight": values((5, 6, *[1] * len(shape)), dtype, 1), "bias": values((5,), dtype, 2)}
    wide = [torch.from_numpy(array.astype(np.float32)) for array in (x, *params.values())]
    assert_same(
        run("conv", {"x": x}, params)[0],
        CONV[len(shape)](*wide).numpy().astype(dtype),
        rtol=1e-5,
        atol=1e-5,
    )


@given(case=convolutions())
@QUICK
def test_conv_in_fp16_precision_stays_near_the_exact_one(case: dict) -> None:
    x, params = tensors_of(case)
    params["pad_type"] = "same"
    exact, narrow = (
        run("conv", {"x": x}, params, precision=precision)[0] for precision in ("fp32", "fp16")
    )
    np.testing.assert_allclose(narrow, exact, rtol=5e-3, atol=5e-2)


@given(case=convolutions())
@QUICK
def test_conv_transpose_with_custom_padding_agrees_with_pytorch(case: dict) -> None:
    x, params = tensors_of(case, transposed=True)
    full = TRANSPOSE[case["rank"]](
        torch.from_numpy(x),
        torch.from_numpy(params["weight"]),
        torch.from_numpy(params["bias"]) if case["bias"] else None,
        params["strides"],
        0,
        0,
        params["groups"],
        params["dilations"],
    ).numpy()
    crop = [
        slice(before, full.shape[axis + 2] - after)
        for axis, (before, after) in enumerate(
            zip(case["pad"][::2], case["pad"][1::2], strict=True)
        )
    ]
    expected = full[(slice(None), slice(None), *crop)]
    if not expected.size:
        return
    (out,) = run("conv_transpose", {"x": x}, {**params, "pad_type": "custom", "pad": case["pad"]})
    assert_same(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("padding", [0, 1])
def test_conv_transpose_with_an_output_shape_keeps_what_pytorch_keeps(
    padding: int, output_padding: int
) -> None:
    """PyTorch's `output_padding` reaches Core ML as `output_shape`: the front is cropped by
    `padding`."""
    x, weight = values((1, 3, 5), np.float32, 0), values((3, 4, 3), np.float32, 1)
    tensors = torch.from_numpy(x), torch.from_numpy(weight)
    expected = F.conv_transpose1d(*tensors, None, 2, padding, output_padding).numpy()
    (out,) = run(
        "conv_transpose",
        {"x": x},
        {
            "weight": weight,
            "strides": [2],
            "pad_type": "custom",
            "pad": [padding, padding],
            "output_shape": list(expected.shape),
        },
    )
    assert_same(out, expected, rtol=1e-4, atol=1e-5)


def test_conv_transpose_with_same_padding_multiplies_the_size_by_the_stride() -> None:
    x, weight = values((1, 2, 4), np.float32, 0), values((2, 3, 3), np.float32, 1)
    (out,) = run("conv_transpose", {"x": x}, {"weight": weight, "strides": [2], "pad_type": "same"})
    full = F.conv_transpose1d(torch.from_numpy(x), torch.from_numpy(weight), None, 2).numpy()
    assert_same(out, full[:, :, :8], rtol=1e-5, atol=1e-5)


def test_conv_quantized_expands_linear_weights() -> None:
    rng = np.random.default_rng(0)
    x = values((1, 3, 4, 4), np.float32, 0)
    stored = rng.integers(0, 255, (2, 3, 3, 3)).astype(np.uint8)
    scale, shift = np.array([0.01, 0.02], np.float32), np.array([-1.0, -2.0], np.float32)
    weight = stored * scale.reshape(2, 1, 1, 1) + shift.reshape(2, 1, 1, 1)
    params = {
        "weight": stored,
        "quantization_type": "linear",
        "nbits": 8,
        "quant_scale": scale,
        "quant_bias": shift,
    }
    expected = F.conv2d(torch.from_numpy(x), torch.from_numpy(weight.astype(np.float32))).numpy()
    declared = declare("conv", {"x": x}, {"weight": weight.astype(np.float32)}, ct.target.iOS15)
    (out,) = run("conv_quantized", {"x": x}, params, ct.target.iOS15, outputs=declared)
    assert_same(out, expected, rtol=1e-5, atol=1e-5)
