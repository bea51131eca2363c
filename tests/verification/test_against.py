"""Two runtimes on the same inputs: what counts as apart, and that it is found."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ane_moe.cli import main
from ane_moe.manifest import Shard
from ane_moe.runtime import RUNTIMES
from ane_moe.runtime.reference import runtime as reference
from ane_moe.verification.against import _whole, check_against
from ane_moe.verification.pairs import AgainstReport, PairResult, Sums, paired
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

SHARD = Shard("moe/layer_00.mlpackage", "moe", 0, ())
needs_core_ai = pytest.mark.skipif(
    importlib.util.find_spec("coreai_torch") is None, reason="Core AI's packages are not installed"
)


def judged(ours: list, theirs: list, base: list | None = None) -> PairResult:
    sums = Sums()
    arrays = (np.array(values, np.float16) for values in (ours, theirs))
    sums.add(*arrays, None if base is None else np.array(base, np.float16))
    return paired(SHARD, "decode", "y", sums, 1e-2)


def test_figures_are_those_of_a_hand_calculation() -> None:
    row = judged([3, 4], [3, 4.5])
    assert row.max_abs_error == 0.5
    assert row.relative_l2 == pytest.approx(0.5 / 5)
    assert row.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert not row.passed and row.reason == "relative L2 1.00e-01 is above 0.01"


def test_errors_are_relative_to_what_is_added() -> None:
    """0.5 is little beside 100, and half of what the part added to it."""
    assert judged([101, 100], [101.5, 100]).passed
    assert not judged([101, 100], [101.5, 100], base=[100, 100]).passed


def test_a_unit_in_the_last_place_is_allowed_for() -> None:
    """Of fp16 between 64 and 128 that is 1/16: each runtime rounds its own sum."""
    apart = judged([100, 64], [100.0625, 64], base=[99, 64])
    assert apart.passed and apart.relative_l2 == pytest.approx(0.0625) and apart.beyond == 0
    assert not judged([100, 64], [100.25, 64], base=[99, 64]).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    assert judged([1, 2], [1, value]).reason == "NaN or Inf in the output"


def test_nothing_added_on_both_sides_agrees() -> None:
    assert judged([5, 6], [5, 6], base=[5, 6]).passed
    assert judged([5, 6], [7, 6], base=[5, 6]).beyond == math.inf


class Skewed:
    """The reference runtime, but for one value of one function."""

    name, value = "prefill", "y"

    def __init__(self, package: Any):
        self._package = package

    def function(self, name: str) -> Any:
        function = self._package.function(name)
        if name != self.name:
            return function
        exact = function.predict

        def predict(inputs: Any, state: Any = None) -> dict[str, np.ndarray]:
            given = exact(inputs, state)
            if self.value in given:
                given[self.value] = given[self.value] * np.float16(1.05)
            elif state is not None and self.value in state.tensors:
                state.tensors[self.value] = state.tensors[self.value] * 1.05
            return given

        function.predict = predict
        return function


@pytest.mark.parametrize("value", ["y", "gates", "v_cache", "logits"])
def test_a_runtime_that_computes_one_value_otherwise_is_found(
    conversion: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    own = reference.open_package
    monkeypatch.setitem(RUNTIMES, "skewed", "ane_moe.runtime.reference.runtime")
    monkeypatch.setattr(Skewed, "value", value)
    monkeypatch.setattr(
        "ane_moe.verification.against.open_package",
        lambda path, runtime: Skewed(own(path)) if runtime == "skewed" else own(path),
    )
    report = check_against(conversion, "skewed")
    failed = {(row.function, row.value) for row in report.pairs if not row.passed}
    assert ("prefill", value) in failed and not report.passed
    # Through a cache, what is computed from it is apart too; else nothing but the one value.
    assert value == "v_cache" or failed == {("prefill", value)}


def test_a_part_that_fails_is_followed_by_where_to_look(
    conversion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = replace(check_against(conversion, "reference").pairs[0], passed=False)
    report = AgainstReport(False, "", "coreai", 0, "golden", 1, 1, (failing,), (), ())
    monkeypatch.setattr("ane_moe.verification.against.check_against", lambda *_, **__: report)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(conversion), "--against", "coreai", "--quick"])
    assert ended.value.code == 1
    path = conversion / failing.path
    line = f"next: ane-moe diff {path} --function {failing.function} --runtime-b coreai"
    assert line in capsys.readouterr().out


def test_a_runtime_agrees_with_itself(conversion: Path) -> None:
    report = check_against(conversion, "reference")
    assert report.passed and report.inputs == "golden"
    assert report.pairs and all(row.max_abs_error == 0 for row in report.pairs)
    assert {row.value for row in report.pairs} >= {"y", "gates", "logits", "k_cache", "v_cache"}
    assert report.golden and all(row.passed for row in report.golden)


@needs_core_ai
def test_core_ai_agrees_with_ours_and_with_the_golden(
    conversion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(conversion), "--against", "coreai", "--json"])
    assert ended.value.code == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert against["passed"] and against["inputs"] == "golden" and not against["left_out"]
    assert {row["function"] for row in against["pairs"]} == {"decode", "prefill"}
    assert all(row["cosine"] > 0.9999 for row in against["golden"])


@pytest.fixture(scope="module")
def other_forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts that the host dispatches, and states that it keeps."""
    folder = tmp_path_factory.mktemp("forms")
    checkpoint = tiny_checkpoint("qwen3_moe", folder / "checkpoint")
    options = {"state": "explicit", "expert_tokens": (1, 4)}
    for routing in ("sparse", "stream"):
        tiny_conversion(checkpoint, folder / routing, routing=routing, **options)
    return folder


@pytest.mark.parametrize("routing", ["sparse", "stream"])
def test_of_dispatched_experts_one_of_each_kind_is_judged(other_forms: Path, routing: str) -> None:
    report = check_against(other_forms / routing, "reference")
    judged = {row.function for row in report.pairs if row.kind.startswith("expert")}
    prefix = "expert_000_" if routing == "sparse" else ""
    assert judged == {f"{prefix}t1", f"{prefix}t4"}
    assert {row.value for row in report.pairs} >= {"y", "ffn_input", "k_cache_out", "v_cache_out"}
    assert report.passed and report.inputs == "drawn"


@needs_core_ai
@pytest.mark.parametrize("routing", ["sparse", "stream"])
def test_core_ai_agrees_on_dispatched_experts_and_on_explicit_states(
    other_forms: Path, routing: str
) -> None:
    report = check_against(other_forms / routing, "coreai")
    assert report.passed and not report.left_out


@needs_core_ai
def test_core_ai_finds_what_is_computed_otherwise(
    conversion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ane_moe.runtime.coreai.operations import OPERATIONS

    monkeypatch.setitem(OPERATIONS, "sigmoid", lambda x: (1.1 * x).sigmoid())
    report = check_against(conversion, "coreai")
    assert {row.kind for row in report.pairs if not row.passed} == {"moe", "dense"}


def test_what_a_rounding_left_over_is_judged_with_the_sum_that_it_is_of() -> None:
    ours = {"memory_1": np.array([64], np.float16), "rest_1": np.array([0.03], np.float16)}
    theirs = {"memory_1": np.array([64.0625], np.float16), "rest_1": np.array([-0.03], np.float16)}
    sums = Sums()
    sums.add(_whole(ours)["rest_1"], _whole(theirs)["rest_1"], None)
    assert paired(SHARD, "decode", "rest_1", sums, 1e-4).passed
    np.testing.assert_array_equal(_whole(ours)["memory_1"], ours["memory_1"])
