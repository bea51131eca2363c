"""The Neural Engine's arithmetic against what engines were seen to give.

The published vectors, errors and cliffs are from an M4 and an M6 (751K's study of both) and an M3
Max (apple/coremltools issues 2687 and 2690). `by_the_rules` is a second implementation, product by
product in Python's own numbers, that the fast one must match to the bit.
"""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ops.op_harness import run
from scipy.special import erf

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime import with_precision
from ane_moe.runtime.reference.engine import fixed_point
from ane_moe.runtime.reference.engine.facts import TABLES
from ane_moe.runtime.reference.engine.rounding import to_fp16

VECTORS = json.loads(Path(__file__).with_name("engine_vectors.json").read_text())
CHANNELS = 64
LIMIT = 32768


def number(value: float | str) -> np.float16:
    """A value of the vectors: a number, or a bit pattern."""
    if isinstance(value, str) and value.startswith("0x"):
        return np.uint16(int(value, 16)).view(np.float16)
    return np.float16(float(value))


def every_fp16() -> np.ndarray:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return numbers[np.isfinite(numbers)]


def unary(op: str, x: np.ndarray, **params: Any) -> np.ndarray:
    """What the engine's `op` gives for each number, in fp64."""
    outputs = [TensorType("fp16", x.shape)]
    found = run(op, {"x": x}, params, precision="engine", outputs=outputs)[0]
    return found.astype(np.float64)


# ---- published vectors


@pytest.mark.parametrize("vector", VECTORS["dot"], ids=lambda row: row["case"])
def test_a_convolution_gives_the_published_sum(vector: dict[str, Any]) -> None:
    x = np.zeros((1, CHANNELS, 1, 1), np.float16)
    weight = np.zeros((1, CHANNELS, 1, 1), np.float16)
    for channel, (a, b) in enumerate(zip(vector["x"], vector["w"], strict=True)):
        x[0, channel], weight[0, channel] = number(a), number(b)
    tensors = {"x": x, "weight": weight, "bias": np.array([vector["bias"]], np.float16)}
    outputs = [TensorType("fp16", (1, 1, 1, 1))]
    found = run("conv", tensors, precision="engine", outputs=outputs)[0].item()
    assert found == float(vector["out"])
    assert math.copysign(1, found) == math.copysign(1, float(vector["out"]))  # never -0


@pytest.mark.parametrize("vector", VECTORS["elementwise"], ids=lambda row: row["op"])
def test_an_element_is_rounded_as_published(vector: dict[str, Any]) -> None:
    tensors = {name: np.array([number(vector[name])]) for name in ("x", "y")}
    outputs = [TensorType("fp16", (1,))]
    found = run(vector["op"], tensors, precision="engine", outputs=outputs)[0].item()
    assert found == float(vector["out"])


def test_all_published_vectors_are_there() -> None:
    assert len(VECTORS["dot"]) + len(VECTORS["elementwise"]) == 191


@pytest.mark.parametrize(
    ("fact", "value"), [("DROPPED_AT", -18), ("LIMIT", 65504.0), ("_lifted", lambda x: x)]
)
def test_another_rule_would_fail_the_vectors(
    monkeypatch: pytest.MonkeyPatch, fact: str, value: object
) -> None:
    monkeypatch.setattr(fixed_point, fact, value)
    wrong = 0
    for vector in VECTORS["dot"]:
        w, x = (
            torch.from_numpy(np.array([number(v) for v in vector[side]]).astype(np.float32))
            for side in ("w", "x")
        )
        if bool(torch.isfinite(x).all()):
            sums = fixed_point.dot(w[None], x[:, None], torch.tensor([float(vector["bias"])]))
            wrong += sums.total.item() != float(vector["out"])
    assert wrong


# ---- the fast path against the rules


def exponent(value: float) -> int:
    return max(math.frexp(value)[1] - 1, -14)


def half_away(value: Fraction) -> int:
    size = math.floor(abs(value) + Fraction(1, 2))
    return size if value >= 0 else -size


def by_the_rules(w: list[float], x: list[float], bias: float) -> float:
    """One sum, as the rules say it: exact rational numbers, one product after the other."""
    total = half_away(Fraction(bias) * 65536)
    if abs(total) >= LIMIT << 16:
        return math.copysign(math.inf, total)
    for a, b in zip(w, x, strict=True):
        if exponent(a) + exponent(b) > -17:
            total += half_away(Fraction(a) * Fraction(b) * 65536)
        if abs(total) >= LIMIT << 16:
            return math.copysign(math.inf, total)
    spacing = max(0, abs(total).bit_length() - 11)
    return float(half_away(Fraction(total, 1 << spacing)) << spacing) / 65536


def numbers(generator: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """fp16 numbers of many magnitudes, zeros and subnormals among them."""
    spread = generator.standard_normal(shape) * size * 10 ** generator.uniform(-4, 0, shape)
    spread[generator.random(shape) < 0.05] = 0
    return np.clip(spread, -65504, 65504).astype(np.float16).astype(np.float32)


@settings(max_examples=60, deadline=None)
# Products near 64, where a whole number of units is nearest to being lifted over the next half.
@example(seed=27040, sizes=(6, 15, 2), magnitude=(0.0, 1.6658094274003936))
@given(
    seed=st.integers(0, 1 << 30),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(1, 7)),
    magnitude=st.tuples(st.floats(-6, 3), st.floats(-6, 4)),
)
def test_the_fast_path_gives_the_bits_of_the_rules(
    seed: int, sizes: tuple[int, int, int], magnitude: tuple[float, float]
) -> None:
    generator, (rows, terms, columns) = np.random.default_rng(seed), sizes
    w = numbers(generator, (rows, terms), 10 ** magnitude[0])
    x = numbers(generator, (terms, columns), 10 ** magnitude[1])
    bias = numbers(generator, (rows,), 10 ** sum(magnitude))
    arguments = (torch.from_numpy(one) for one in (w, x, bias))
    sums = fixed_point.dot(*arguments, count=True)
    expected = [
        [by_the_rules(row.tolist(), column.tolist(), begin) for column in x.T]
        for row, begin in zip(w, bias.tolist(), strict=True)
    ]
    assert sums.total.tolist() == expected
    assert sums.overflows == np.isinf(expected).sum()
    exponents = [np.maximum(np.frexp(one)[1] - 1, -14) for one in (w, x)]
    low = exponents[0][:, :, None] + exponents[1][None] <= -17
    there = (w[:, :, None] != 0) & (x[None] != 0)
    assert sums.dropped == (low & there).sum()


@pytest.mark.parametrize("most", range(1030, 2048, 203))
def test_every_product_just_below_64_is_its_nearest_whole_number_of_units(most: int) -> None:
    """All mantissas beside one another. The largest weight decides what counts as below 64."""
    w = torch.arange(1024, most)[:, None] / 1024  # (M, 1)
    columns = torch.arange(1024, 2048)[:, None] / 32  # (N, 1)
    units = torch.zeros(len(columns), len(w), dtype=torch.int64)
    fixed_point._add_products(w, columns, units, count=False)
    assert torch.equal(units, fixed_point.products_in_units(w.t(), columns))


def test_long_sums_in_blocks_give_the_bits_of_the_rules() -> None:
    generator = np.random.default_rng(1)
    w, x = numbers(generator, (40, 3000), 0.1), numbers(generator, (3000, 3), 400)
    w[0, :9], x[:9, 0] = 60, 300  # an outlier's products are above 64
    total = fixed_point.dot(torch.from_numpy(w), torch.from_numpy(x)).total
    for row in (0, 17, 39):
        for column in range(3):
            expected = by_the_rules(w[row].tolist(), x[:, column].tolist(), 0)
            assert total[row, column] == expected


def test_halves_are_rounded_away_from_zero_for_every_pair_of_neighbours() -> None:
    numbers16 = np.unique(every_fp16().astype(np.float32))
    middle = torch.from_numpy((numbers16[:-1] + numbers16[1:]) / 2)
    outer = np.where(np.abs(numbers16[:-1]) > np.abs(numbers16[1:]), numbers16[:-1], numbers16[1:])
    assert to_fp16(middle).tolist() == outer.tolist()
    near = torch.nextafter(middle, torch.zeros(()))
    inner = np.where(np.abs(numbers16[:-1]) > np.abs(numbers16[1:]), numbers16[1:], numbers16[:-1])
    assert to_fp16(near).tolist() == inner.tolist()


# ---- tables


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("op", "exact", "ends", "error"),
    [
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), (-8, 8), 3.355e-3),
        ("tanh", np.tanh, (-4, 4), 1.613e-3),
        ("erf", erf, (-2, 2), 8.642e-4),
        ("sin", np.sin, (-1.5, 1.5), 6.329e-4),
        ("gelu", gelu, (-4, 4), 6.159e-3),
        ("silu", silu, (-8, 8), 1.491e-2),
        ("log", np.log, (2.0**-14, 65504), 6.638e-3),
    ],
)
def test_the_largest_error_is_the_published_one(
    op: str, exact: Callable[[np.ndarray], np.ndarray], ends: tuple[float, float], error: float
) -> None:
    x = every_fp16()
    x = x[(x >= ends[0]) & (x <= ends[1])]
    params = {"log": {"epsilon": np.float16(0)}, "gelu": {"mode": "EXACT"}}.get(op, {})
    found = np.abs(unary(op, x, **params) - exact(x.astype(np.float64))).max()
    assert found == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    ("op", "exact", "ulp"),
    [("sqrt", np.sqrt, 1.2), ("rsqrt", lambda x: x**-0.5, 2.1), ("exp", np.exp, 9.1)],
)
def test_the_largest_relative_error_is_the_published_one(
    op: str, exact: Callable[[np.ndarray], np.ndarray], ulp: float
) -> None:
    x = every_fp16()
    x = x[(x > -9.7) & (x < 10)] if op == "exp" else x[x >= 2.0**-13]
    true = exact(x.astype(np.float64))
    params = {"epsilon": np.float16(0)} if op == "rsqrt" else {}
    spacing = np.spacing(np.abs(true).astype(np.float16)).astype(np.float64)
    assert (np.abs(unary(op, x, **params) - true) / spacing).max() == pytest.approx(ulp, rel=0.06)


def test_gelu_is_one_table_in_both_modes() -> None:
    x = every_fp16()
    modes = [unary("gelu", x, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION")]
    np.testing.assert_array_equal(*modes)


def test_silu_misses_zero_as_published() -> None:
    at_zero, at_half = unary("silu", np.array([0, 0.5], np.float16))
    assert at_zero == pytest.approx(-0.0017, abs=5e-5)
    assert at_half == pytest.approx(0.296, abs=1e-3)  # 0.311


def test_tables_have_33_values_or_the_part_that_is_used() -> None:
    assert {name: len(table.values) for name, table in TABLES.items()} == {
        **dict.fromkeys(("sigmoid", "tanh", "erf", "sin", "exp", "log"), 33),
        **dict.fromkeys(("inverse", "gelu", "silu"), 33),
        **dict.fromkeys(("sqrt", "rsqrt"), 25),
    }


# ---- cliffs that users reported


def sweep(first: float, last: float, count: int) -> np.ndarray:
    return np.linspace(first, last, count)


def first_collapse(x: np.ndarray, y: np.ndarray) -> float:
    """Where a rising function first gives 0 after it gave more than 1."""
    return float(x[1:][(y[:-1] > 1) & (y[1:] == 0)][0])


def test_softplus_falls_to_zero_where_it_was_reported() -> None:
    coarse, fine = sweep(-15, 15, 2000), sweep(10.3, 10.5, 201)
    for x, reported in ((coarse, 10.4077), (fine, 10.395)):
        found = first_collapse(x, unary("softplus", x.astype(np.float16)))
        assert found == pytest.approx(reported, abs=5e-5)


def test_the_sum_of_32_exponentials_falls_to_zero_where_it_was_reported() -> None:
    x = sweep(-15, 15, 2000)
    alike = np.repeat(x.astype(np.float16)[None], 32, axis=0)
    outputs = [TensorType("fp16", (len(x),))]
    y = run(
        "reduce_log_sum_exp",
        {"x": alike},
        {"axes": np.array([0], np.int32), "keep_dims": False},
        precision="engine",
        outputs=outputs,
    )[0]
    found = first_collapse(x, y)
    assert found == pytest.approx(7.6313, abs=5e-5)
    assert y[x < found][-1] == pytest.approx(11.09, abs=0.02)


def test_a_softplus_written_out_has_no_cliff() -> None:
    x = sweep(-15, 15, 2000).astype(np.float16)
    below = unary("exp", -np.abs(x)).astype(np.float16)
    tail = unary("log", (1 + below).astype(np.float16), epsilon=np.float16(0))
    assert np.abs(np.maximum(x, 0) + tail - np.logaddexp(0, x.astype(np.float64))).max() < 0.01


def down_projection(total: float, scale: float, precision: str) -> float:
    """gpt-oss's last contraction of a layer (2880 terms) where it adds up to `total`."""
    x = np.full((1, 2880, 1, 1), 8, np.float16)
    weight = np.full((1, 2880, 1, 1), total / (8 * 2880) * scale, np.float16)
    outputs = [TensorType("fp16", (1, 1, 1, 1))]
    tensors = {"x": x, "weight": weight}
    return float(run("conv", tensors, precision=precision, outputs=outputs)[0].item())


def test_gpt_oss_overflows_in_its_last_layer_as_published_and_a_folded_scale_mends_it() -> None:
    """Layer 35 of gpt-oss-120b adds 33,760 to a stream of 58,820 (ROCm/hip-ep 168, fp16 on a GPU):
    the sum is beyond fp16. The engine loses the 33,760 before that. A quarter in the weights, a
    power of two, changes no other bit."""
    stream, added = 58820.0, 33760.0
    assert down_projection(added, 1, "fp32") == pytest.approx(added, rel=1e-3)
    assert down_projection(added, 1, "engine") == math.inf
    quarter = down_projection(added, 0.25, "engine")
    assert quarter == down_projection(added, 0.25, "fp32") == pytest.approx(added / 4, rel=1e-3)

    def total(first: float, second: float) -> float:
        given = {"x": np.array([first], np.float16), "y": np.array([second], np.float16)}
        outputs = [TensorType("fp16", (1,))]
        return float(run("add", given, precision="engine", outputs=outputs)[0].item())

    assert total(stream, added) == math.inf
    assert total(stream / 4, quarter) == pytest.approx((stream + added) / 4, rel=2e-3)


def test_infinite_numbers_are_large_ones() -> None:
    x = np.array([np.inf, -np.inf, np.nan], np.float16)
    assert unary("sigmoid", x).tolist() == [1, 0, 1]
    assert unary("tanh", x).tolist() == [1, -1, 1]
    assert unary("exp", x)[1] == 0
    assert unary("inverse", x[:1], epsilon=np.float16(0)).item() == 2.0**-16
    assert unary("softmax", np.array([0, -np.inf], np.float16), axis=0).tolist() == [1, 0]


# ---- what is not the engine's


def test_what_is_not_fp16_is_computed_as_ever() -> None:
    x, ones = np.full((1, 4), 40000, np.float32), np.ones((4, 1), np.float32)
    assert run("matmul", {"x": x, "y": ones}, precision="engine")[0].item() == 160000
    assert run("exp", {"x": np.ones(1, np.float32)}, precision="engine")[0].item() == np.float32(
        math.e
    )


def test_an_unknown_precision_names_the_known() -> None:
    with pytest.raises(UserError, match="fp32, fp16, engine"):
        run("exp", {"x": np.ones(1, np.float32)}, precision="fp8")


def test_a_precision_is_the_reference_runtimes() -> None:
    assert with_precision("auto", "engine") == ("reference", {"precision": "engine"})
    assert with_precision("coreml", "fp32") == ("coreml", {})
    with pytest.raises(UserError, match="leave --runtime out"):
        with_precision("coreml", "engine")


# ---- every shape that the exact operations take


def engine(op: str, tensors: dict[str, np.ndarray], shape: tuple[int, ...], **params: Any) -> Any:
    outputs = [TensorType("fp16", shape)]
    return run(op, tensors, params, precision="engine", outputs=outputs)[0].astype(np.float32)


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((2, 6, 9), (4, 3, 3), {"groups": 2, "stride": 2, "dilation": 2}),
        ((2, 6, 5, 7), (4, 6, 2, 3), {"padding": 1}),
        ((1, 6, 5, 7), (6, 1, 3, 3), {"groups": 6}),
        ((3, 4, 5, 1), (8, 4, 1, 1), {}),
        ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"stride": 2}),
    ],
    ids=["groups, stride and dilation", "padded", "depthwise", "batch", "three dimensions"],
)
def test_a_convolution_meets_what_torchs_does(
    size: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).half().float() for s in (size, kernel, kernel[:1]))
    spatial = len(size) - 2
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]
    expected = convolve(x, weight, bias, **options)
    params = {
        "strides": np.array([options.get("stride", 1)] * spatial, np.int32),
        "dilations": np.array([options.get("dilation", 1)] * spatial, np.int32),
        "pad_type": "custom",
        "pad": np.array([options.get("padding", 0)] * 2 * spatial, np.int32),
        "groups": np.int32(options.get("groups", 1)),
    }
    given = {"x": x, "weight": weight, "bias": bias}
    tensors = {name: one.half().numpy() for name, one in given.items()}
    found = engine("conv", tensors, tuple(expected.shape), **params)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("left", "right"),
    [((5,), (5,)), ((5,), (2, 5, 3)), ((4, 5), (5,)), ((2, 1, 4, 5), (3, 5, 6)), ((1, 5), (5, 1))],
)
def test_a_product_broadcasts_as_numpys(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(shape).astype(np.float16) for shape in (left, right))
    expected = x.astype(np.float32) @ y.astype(np.float32)
    found = engine("matmul", {"x": x, "y": y}, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_attention_and_what_it_is_made_of_stay_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
    tensors = {"query": query, "key": key, "value": value}
    given = {name: one.half().numpy() for name, one in tensors.items()}
    mask = torch.zeros(3, 5).masked_fill(~seen, -math.inf).half().numpy()
    op, shape = "scaled_dot_product_attention", tuple(expected.shape)
    for hidden in (seen.numpy(), mask):
        found = engine(op, {**given, "attn_mask": hidden}, shape)
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize(
    ("op", "exact", "params"),
    [
        ("real_div", np.divide, {}),
        ("reduce_mean", lambda x: x.mean(-1), {"axes": np.array([-1], np.int32)}),
        (
            "layer_norm",
            lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
            {"axes": np.array([-1], np.int32)},
        ),
        ("cos", np.cos, {}),
        ("inverse", lambda x: 1 / x, {"epsilon": np.float16(0)}),
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), {"axis": -1}),
    ],
)
def test_other_operations_stay_near_the_exact_ones(
    op: str, exact: Callable[..., np.ndarray], params: dict[str, Any]
) -> None:
    x = np.random.default_rng(0).uniform(0.1, 5, (4, 32)).astype(np.float16)
    tensors = {"x": x, "y": x[::-1].copy()} if op == "real_div" else {"x": x}
    expected = exact(*(one.astype(np.float64) for one in tensors.values()))
    shape = (4,) if op == "reduce_mean" else (4, 32)
    params = params | ({"keep_dims": False} if op == "reduce_mean" else {})
    np.testing.assert_allclose(engine(op, tensors, shape, **params), expected, rtol=1e-2, atol=3e-3)
