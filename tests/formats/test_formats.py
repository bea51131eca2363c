"""Weight formats against coremltools' own compressors, hand calculations, and the worst matrices
there are."""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight
from coremltools.optimize._utils import quantize_weight
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from ane_moe.errors import UserError
from ane_moe.formats.encoded import Encoded
from ane_moe.formats.encoders import APPLE_LEVELS, parse_format
from ane_moe.formats.expand import expand
from ane_moe.formats.low_rank import split_directions
from ane_moe.formats.palettes import assign, fit_palettes

ALL = [
    "int8",
    "int4-channel",
    "lut8",
    "lut6",
    "lut4",
    "lut3",
    "lut2",
    "lut4-g8",
    "lut4-g32",
    "lut4-tensor",
    "lut4+scale",
    "lut4-v2",
    "lut6-v4",
    "lut4-g8-v2",
    "apple2",
    "apple2-g16",
    "int8-block32",
    "int4-block32",
    "sparse50",
    "sparse50+int8",
    "sparse50+lut4",
    "sparse0+lut3",
    "sparse75+int4-channel",
]
EXACT_SIZES = [name for name in ALL if not name.startswith("sparse0")]
rng = np.random.default_rng(0)
GAUSS = (rng.standard_normal((48, 160)) * 0.02).astype(np.float16)
GAUSS[0] = 0
GAUSS[1] = 0.25
GAUSS[2] = np.float16(2**-24)
GAUSS[3, 5] = 65504
GAUSS[4, 7] = -65504


def encode(name: str, weight: np.ndarray, moments: np.ndarray | None = None) -> Encoded:
    encoded = parse_format(name).encode(weight, moments)
    assert encoded is not None
    return encoded


def error(encoded: Encoded, weight: np.ndarray) -> float:
    return float(((expand(encoded).astype(np.float64) - weight) ** 2).sum())


@pytest.mark.parametrize("name", ALL)
def test_the_worst_matrices_have_a_finite_value_of_the_right_size(name):
    form = parse_format(name)
    for weight in (
        GAUSS,
        GAUSS[:1],
        GAUSS[:, :1].copy(),
        GAUSS[3:4, 5:6].copy(),
        np.zeros((7, 13), np.float16),
        np.full((6, 10), 65504, np.float16),
        np.full((5, 3), -(2.0**-24), np.float16),
    ):
        encoded = encode(name, weight)
        dense = expand(encoded)
        assert (
            dense.shape == weight.shape and dense.dtype == np.float16 and np.isfinite(dense).all()
        )
        if name in EXACT_SIZES and "sparse" not in name:
            assert encoded.stored_bytes == form.stored_bytes(*weight.shape)
        else:
            assert encoded.stored_bytes <= form.stored_bytes(*weight.shape)


@pytest.mark.parametrize(
    "name", [name for name in ALL if "apple2" not in name and "sparse" not in name]
)
def test_zeros_and_single_values_are_exact(name):
    for value in (0.0, 0.3, -1000.0):
        weight = np.full((16, 32), value, np.float16)
        assert np.allclose(
            expand(encode(name, weight)), weight, rtol=0 if name.startswith("lut") else 1e-3
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int8", "lut4", "apple2", "sparse50"])
def test_what_is_not_finite_is_refused(name, value):
    weight = np.zeros((4, 4), np.float16)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        encode(name, weight)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    exponent=st.integers(-24, 14),
    seed=st.integers(0, 99),
)
def test_int8_is_within_half_a_step_of_every_weight(rows, columns, exponent, seed):
    draw = np.random.default_rng(seed)
    weight = (
        (draw.standard_normal((rows, columns)) * 2.0**exponent)
        .astype(np.float16)
        .clip(-65504, 65504)
    )
    (expansion,) = encode("int8", weight).expansions
    scale = expansion.inputs["scale"].values.reshape(rows, 1).astype(np.float64)
    data = expansion.inputs["data"].values.reshape(rows, columns)
    largest = np.abs(weight.astype(np.float64)).max(1, keepdims=True)
    assert np.all(np.abs(data.astype(int)) <= 127) and np.all(
        scale <= largest / 127 * 1.001 + 2.0**-24
    )
    assert np.all(np.abs(data * scale - weight) <= scale / 2 + largest * 2.0**-10 + 2.0**-24)


def test_int8_is_what_coremltools_makes():
    """The same integers, but for weights that lie half-way: its scale is not rounded to fp16 before
    it is used."""
    (encoded,) = encode("int8", GAUSS[5:]).expansions
    ours = encoded.inputs["data"].values
    theirs, scale, _ = quantize_weight(
        GAUSS[5:], (1,), 8, True, "LINEAR_SYMMETRIC", np.dtype(np.int8)
    )
    different = ours[:, :, 0, 0].astype(int) - theirs
    assert np.abs(different).max() <= 1 and np.count_nonzero(different) < 0.02 * theirs.size
    assert np.allclose(encoded.inputs["scale"].values.ravel(), scale.ravel(), rtol=1e-2)


MATRICES = {
    "normal": rng.standard_normal((16, 1024)) * 0.02,
    "heavy tails": rng.standard_t(3, (16, 512)) * 0.02,
    "uniform": rng.uniform(-1, 1, (16, 512)),
    "two humps": rng.choice([-1, 1], (16, 512)) + 0.1 * rng.standard_normal((16, 512)),
    "outliers": np.concatenate(
        [rng.standard_normal((15, 512)), 3000 * rng.standard_normal((1, 512))]
    ),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("bits", [2, 4])
def test_palettes_are_as_good_as_those_of_coremltools(name, bits):
    values = MATRICES[name].astype(np.float16).reshape(1, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, indices = _get_kmeans_lookup_table_and_weight(bits, values.astype(np.float32))
    theirs = (
        (table.reshape(-1)[indices.reshape(-1)] - values.astype(np.float64).reshape(-1)) ** 2
    ).sum()
    palettes = fit_palettes(values, 1 << bits)
    ours = ((palettes[0][assign(values, palettes)[0]].astype(np.float64) - values[0]) ** 2).sum()
    assert ours <= 1.001 * theirs


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99),
    entries=st.sampled_from([4, 16, 256]),
    spread=st.sampled_from([1e-6, 1.0, 2e4]),
)
@example(seed=99, entries=16, spread=1e-6)  # subnormal numbers
def test_every_value_gets_its_nearest_entry(seed, entries, spread):
    values = (
        (np.random.default_rng(seed).standard_t(2, (3, 97)) * spread)
        .clip(-65504, 65504)
        .astype(np.float16)
    )
    palettes = fit_palettes(values, entries)
    assert np.all(np.diff(palettes.astype(np.float64), axis=1) >= 0)
    distance = np.abs(values[:, :, None].astype(np.float64) - palettes[:, None].astype(np.float64))
    chosen = np.take_along_axis(distance, assign(values, palettes)[:, :, None].astype(int), 2)[
        :, :, 0
    ]
    assert np.array_equal(chosen, distance.min(2))


@pytest.mark.parametrize("entries", [4, 16, 64])
@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "two modes", "uniform", "one outlier", "few bits"]
)
def test_palettes_of_any_distribution_are_near_the_best_of_scikit_learns_many_tries(kind, entries):
    generator = np.random.default_rng(1)
    values = {
        "normal": lambda: generator.standard_normal(4000) * 0.02,
        "heavy tails": lambda: generator.standard_t(3, 4000) * 0.02,
        "two modes": lambda: (
            generator.standard_normal(4000) * 0.01 + generator.choice([-0.2, 0.2], 4000)
        ),
        "uniform": lambda: generator.uniform(-1, 1, 4000),
        "one outlier": lambda: np.append(generator.standard_normal(3999) * 0.02, 60000),
        "few bits": lambda: (
            generator.choice([-6, -3, -1, 0, 1, 2, 4], 4000)
            * 2.0 ** generator.integers(-3, 1, 4000)
        ),
    }[kind]().astype(np.float16)
    palettes = fit_palettes(values[None], entries)
    ours = palettes[0][assign(values[None], palettes)[0]]
    theirs = KMeans(entries, n_init=5, random_state=0).fit(values[:, None].astype(np.float64))
    error = float(((ours.astype(np.float64) - values) ** 2).sum())
    rounding = float((values.astype(np.float64) ** 2).sum()) * 2.0**-22  # their levels are not fp16
    assert error <= 1.1 * theirs.inertia_ + rounding


def test_few_values_are_kept_exactly_in_any_palette():
    weight = rng.choice(np.array([-3.0, -0.0, 0.001, 7.0], np.float16), (32, 24))
    for name in ("lut2", "lut4", "lut8", "lut4-tensor"):
        assert np.array_equal(expand(encode(name, weight)), weight)


def test_apples_levels_are_exactly_the_palette():
    scaled, look_up = encode("apple2", GAUSS).expansions
    assert set(np.unique(scaled.inputs["data"].values).tolist()) == set(APPLE_LEVELS)
    assert scaled.inputs["scale"].values.shape == (48, 1, 1, 1, 1, 1) and look_up.inputs["lut"] == (
        0,
        0,
    )
    weight = np.array([[-1.5, -0.5, 0.5, 1.5] * 8], np.float16) * np.float16(0.5)
    assert np.array_equal(expand(encode("apple2", weight)), weight)


def test_scales_help_rows_of_different_size():
    weight = GAUSS[8:40] * np.exp2(rng.integers(-6, 6, (32, 1))).astype(np.float16)
    plain = error(encode("lut4-tensor", weight), weight / 1)
    assert error(encode("lut4-tensor+scale", weight), weight) < plain


def test_moments_move_the_error_to_where_it_does_not_matter():
    weight, moments = GAUSS[8:40], np.ones(160, np.float32)
    moments[:20] = 1000
    for name in ("int8", "lut4", "lut3-v2", "apple2", "int4-channel", "lut4+scale", "sparse0+lut3"):
        squared = [
            (expand(encode(name, weight, m)).astype(np.float64) - weight) ** 2
            for m in (None, moments)
        ]
        assert (squared[1] * moments).sum() < (squared[0] * moments).sum()


def test_sparsity_leaves_out_the_smallest_and_only_as_many_as_asked():
    dense = expand(encode("sparse50", GAUSS))
    zeros = dense == 0
    assert zeros.sum() == GAUSS.size // 2 and np.array_equal(dense[~zeros], GAUSS[~zeros])
    assert np.abs(GAUSS[zeros].astype(float)).max() <= np.abs(GAUSS[~zeros].astype(float)).min()
    assert (expand(encode("sparse25", np.ones((8, 8), np.float16))) == 0).sum() == 16


def test_directions_apart_and_the_remainder_are_the_weight():
    weight = rng.standard_normal((40, 3)) @ rng.standard_normal(
        (3, 64)
    ) + 0.01 * rng.standard_normal((40, 64))
    parts = split_directions(weight.astype(np.float16), 3)
    together = parts.out.astype(np.float64) @ parts.into + parts.remainder
    assert np.abs(together - weight).max() < 5e-3
    best = np.linalg.svd(weight, compute_uv=False)[3:]
    assert (
        np.linalg.norm(parts.remainder.astype(np.float64))
        < 1.05 * math.sqrt((best**2).sum()) + 0.05
    )


def directions() -> bytes:
    numbers = np.random.default_rng(0).integers(-2000, 2000, (2, 96, 160))
    parts = split_directions((numbers.prod(0) / 2.0**24).astype(np.float16), 8)
    return parts.into.tobytes() + parts.out.tobytes() + parts.remainder.tobytes()


def test_directions_are_those_that_a_processor_without_wide_registers_finds():
    plain = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    code = "from tests.formats.test_formats import directions; print(directions().hex())"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | plain, capture_output=True, text=True
    )
    assert found.stdout.strip() == directions().hex(), found.stderr


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int",
        "int3",
        "lut5",
        "lut4-g7",
        "int8-g16",
        "apple2-v2",
        "sparse200",
        "fp16+scale",
        "sparse50+apple2",
        "sparse50+lut4-v2",
        "lut4-v2+scale",
        "sparse50+int8-block32",
    ],
)
def test_an_unknown_format_is_named(name):
    with pytest.raises(UserError):
        parse_format(name)
