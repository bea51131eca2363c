"""Random ops: their distributions, and what a seed does."""

from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from op_harness import run
from scipy import stats

from ane_moe.errors import UserError
from ane_moe.runtime import load_package
from tests.runtime.saved_program import saved

COUNT = 20_000
SHAPE = [2, COUNT // 2]
LEAST_P = 1e-3  # of a fixed seed: a wrong distribution gives far less


def draw(op: str, precision: str = "fp32", **params: Any) -> np.ndarray:
    (out,) = run(op, {}, {"shape": SHAPE, "seed": 7, **params}, precision=precision)
    assert out.shape == tuple(SHAPE)
    return out.astype(np.float64).ravel()


def test_normal_numbers_are_normal() -> None:
    for precision in ("fp32", "fp16"):
        drawn = draw("random_normal", precision, mean=np.float32(3), stddev=np.float32(0.5))
        assert stats.kstest(drawn, stats.norm(3, 0.5).cdf).pvalue > LEAST_P


def test_uniform_numbers_fill_their_interval_evenly_and_leave_its_end_out() -> None:
    drawn = draw("random_uniform", low=np.float32(-2), high=np.float32(5))
    assert stats.kstest(drawn, stats.uniform(-2, 7).cdf).pvalue > LEAST_P
    coarse = draw(
        "random_uniform", low=np.float16(1000), high=np.float16(1001)
    )  # fp16 has two numbers there
    assert set(coarse) == {1000, 1000.5}
    assert set(draw("random_uniform", low=np.float32(4), high=np.float32(4))) == {4}
    with pytest.raises(UserError, match=r"op random_uniform.*interval from 1.0 to 0.0 is empty"):
        draw("random_uniform", low=np.float32(1), high=np.float32(0))


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_coins_show_one_as_often_as_their_probability_says(prob: float) -> None:
    drawn = draw("random_bernoulli", prob=np.float32(prob))
    assert set(drawn) <= {0, 1}
    assert stats.binomtest(int(drawn.sum()), COUNT, prob).pvalue > LEAST_P


def test_categories_come_as_often_as_logits_and_probabilities_say() -> None:
    logits = np.array([[0, 1, 2, -np.inf], [3, 0, 0, 1]], np.float32)
    powers = np.exp(logits.astype(np.float64))
    probs = powers / powers.sum(-1, keepdims=True)
    for mode, x in (("logits", logits), ("probs", probs.astype(np.float32))):
        (out,) = run("random_categorical", {"x": x}, {"size": COUNT, "mode": mode, "seed": 7})
        assert out.shape == (2, COUNT) and out.dtype == np.float32
        for row, expected in zip(out.astype(int), probs, strict=True):
            counts, possible = np.bincount(row, minlength=4), expected > 0
            assert not counts[~possible].any()
            assert stats.chisquare(counts[possible], expected[possible] * COUNT).pvalue > LEAST_P
    assert run("random_categorical", {"x": logits[0]}, {"seed": 1})[0].shape == (1,)


def test_a_seed_repeats_a_sequence_and_no_seed_gives_another_each_time(tmp_path: Any) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def program(x):
        seeded, free = (mb.random_normal(shape=[64], seed=seed) for seed in (3, -1))
        return mb.add(x=seeded, y=x, name="seeded"), mb.add(x=free, y=x, name="free")

    path = saved(program, tmp_path / "noise.mlpackage")
    functions = [load_package(path, runtime="reference") for _ in range(2)]
    first, second = (
        [function.predict({"x": np.zeros(1, np.float32)}) for _ in range(2)]
        for function in functions
    )
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one["seeded"], other["seeded"]) and not np.array_equal(
            one["free"], other["free"]
        )
    assert not np.array_equal(first[0]["seeded"], first[1]["seeded"])
