import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Feature, TensorType
from ane_moe.runtime import RUNTIMES
from ane_moe.runtime.arrays import random_inputs, read_array, read_inputs
from ane_moe.runtime.interface import Intermediate
from ane_moe.runtime.reference.diff import (
    ACROSS,
    LEAST_GAP,
    Diff,
    Difference,
    Seen,
    Side,
    Unmatched,
    align,
    compare,
    diff,
    unmatched,
)
from ane_moe.runtime.reference.tracing import describe
from tests.runtime.saved_program import saved

Get = Callable[[str], Path]


def build(
    path: Path, offset: float, name: str = "middle", width: int = 4, overflow: bool = False
) -> Path:
    """y = softmax(relu(x + 1) * 2 + offset * [0, 1, ...]), the middle product named as asked."""

    @mb.program(input_specs=[mb.TensorSpec((1, width))], opset_version=ct.target.iOS17)
    def program(x):
        x = mb.relu(x=mb.add(x=x, y=np.float32(1), name="shifted"), name="active")
        x = mb.mul(x=x, y=np.float32(2e38 if overflow else 2), name=name)
        x = mb.mul(x=x, y=np.float32(10), name="beyond") if overflow else x
        tilt = (offset * np.arange(width)).astype(np.float32)
        return mb.softmax(x=mb.add(x=x, y=tilt, name="tilted"), axis=-1, name="y")

    return saved(program, path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return build(folder / "a.mlpackage", 0.5), build(folder / "b.mlpackage", 0.25, name="renamed")


def test_a_package_equals_itself(pair: tuple[Path, Path]) -> None:
    result = diff(Side(pair[0]), Side(pair[0]))
    assert result.same and result.first is None and result.compared == 5
    assert all(one.relative == 0 for one in result.outputs)


def test_the_first_op_that_parts_is_found_and_a_renamed_one_is_matched_by_order(
    pair: tuple[Path, Path],
) -> None:
    result = diff(Side(pair[0]), Side(pair[1]))
    assert not result.same and result.compared == 5 and result.unmatched_a == 0
    assert result.first is not None and (result.first.op, result.first.name_a) == ("add", "tilted")
    assert 0 < result.first.largest <= 0.75 + 1e-6


def chain(path: Path, *factors: float, tail: float = 1) -> Path:
    """y = tanh(x) * each factor in turn, * 1 * tail in the last step: a product per factor."""

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS17)
    def program(x):
        x = mb.tanh(x=x, name="start")
        for index, factor in enumerate(factors):
            x = mb.mul(x=x, y=np.float32(factor), name=f"step_{index}_{factor:g}")
        return mb.relu(x=mb.add(x=x, y=np.float32(tail), name="end"), name="y")

    pipeline = ct.PassPipeline.EMPTY  # which would fold the products
    ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=pipeline,
    ).save(str(path))
    return path


def test_two_packages_part_at_an_operation_that_only_one_of_them_has(tmp_path: Path) -> None:
    short, long = chain(tmp_path / "a.mlpackage"), chain(tmp_path / "b.mlpackage", 3)
    for sides, owner in (((short, long), "B"), ((long, short), "A")):
        result = diff(Side(sides[0]), Side(sides[1]))
        place = result.parts_at
        assert isinstance(place, Unmatched) and not result.same
        assert (place.side, place.op, place.name) == (owner, "mul", "step_0_3")
        assert place.position == 1  # after tanh, before the sum, where values differ
        assert result.first is not None and result.first.name_a == "end"
        lines = CliRunner().invoke(app, ["diff", *map(str, sides)]).stdout.splitlines()
        assert lines[1] == f"first apart: mul step_0_3 [1, 4]: only in {owner}, after start"
        assert lines[2].startswith("then apart: add end: relative")


def test_values_that_differ_before_the_missing_operation_come_first(
    pair: tuple[Path, Path],
) -> None:
    result = diff(Side(pair[0]), Side(pair[1]))
    later = Unmatched("B", "mul", "late", (1, 4), result.compared, "y")
    assert replace(result, only=(later,)).parts_at is result.first


def test_operations_of_one_side_that_change_nothing_are_listed_and_not_apart(
    tmp_path: Path,
) -> None:
    paths = [chain(tmp_path / "a.mlpackage"), chain(tmp_path / "b.mlpackage", 1)]
    result = diff(Side(paths[0]), Side(paths[1]))
    assert result.same and result.parts_at is None
    assert [item.name for item in result.only] == ["step_0_1"]
    shown = CliRunner().invoke(app, ["diff", *map(str, paths)])
    assert shown.exit_code == 0 and "mul step_0_1 [1, 4]: only in B, after start" in shown.stdout


def test_a_first_or_last_operation_that_only_one_side_has_is_not_passed_over() -> None:
    x, y = (Seen("add", name, (2,)) for name in ("x", "y"))
    same = [(Intermediate("add", "x", (2,)),) * 2]
    assert unmatched([x], [x, y], same) == (Unmatched("B", "add", "y", (2,), 1, "x"),)
    assert unmatched([y, x], [x], same) == (Unmatched("A", "add", "y", (2,), 0, ""),)


def test_two_precisions_of_one_package_are_near_but_not_the_same(package: Get) -> None:
    path = package("net_ios18_fp16")
    near = diff(Side(path), Side(path, options={"precision": "fp16"}))
    assert near.same and near.worst is not None and near.worst.relative > 0
    strict = diff(Side(path), Side(path, options={"precision": "fp16"}), tolerance=0)
    assert strict.first is not None


def test_two_runtimes_may_differ_by_more_and_by_what_fp16_may_drop(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant that is 2 % apart, and values around fp16's least normal number."""
    monkeypatch.setitem(RUNTIMES, "other", RUNTIMES["reference"])
    x = {"x": np.ones((1, 4), np.float32)}

    def found(path: Path, runtime: str, **given: float) -> Diff:
        return diff(Side(pair[0]), Side(path, runtime), x, **given)

    near = build(pair[0].parent / "near.mlpackage", 0.54)
    assert found(near, "other").same and found(near, "other").tolerance == 0.05
    assert not found(near, "reference").same and not found(near, "other", tolerance=0.01).same
    assert not found(pair[1], "other").same
    tiny = Difference("clip", "x", "x", (1,), (1,), 0.067, 6e-5)
    assert not tiny.beyond(ACROSS, LEAST_GAP) and tiny.beyond(ACROSS, 0)
    assert replace(tiny, largest=np.inf).beyond(ACROSS, LEAST_GAP)


@pytest.mark.parametrize("tolerance", ["nan", "-0.1", "inf"])
def test_a_tolerance_that_is_none_is_one_line(pair: tuple[Path, Path], tolerance: str) -> None:
    result = CliRunner().invoke(app, ["diff", str(pair[0]), "--tolerance", tolerance])
    assert isinstance(result.exception, UserError) and "not possible" in str(result.exception)


def test_packages_with_other_inputs_are_not_compared(pair: tuple[Path, Path], package: Get) -> None:
    with pytest.raises(UserError, match="input 'x' of function 'main' has the wrong shape"):
        diff(Side(pair[0]), Side(package("net_ios18_fp16")))


def listed(*values: str) -> list[Intermediate]:
    """Of `op name size`."""
    parts = (value.split() for value in values)
    return [Intermediate(op, name, (int(size),)) for op, name, size in parts]


def test_an_operation_more_moves_the_numbers_of_those_behind_it_and_pairs_stay_right() -> None:
    """As exporting numbers them: `var_2` of b is what `var_1` of a is."""
    a = listed("mul x 8", "mul var_1 8", "conv var_2 4", "mul var_3 4", "mul var_4 8", "add y 8")
    more = ["conv guess 2", "mul var_1 4"]
    b = listed(
        "mul x 8", *more, "mul var_2 8", "conv var_3 4", "mul var_4 4", "mul var_5 8", "add y 8"
    )
    expected = [(x, y) for x, y in zip(a, [b[0], *b[3:]], strict=True)]
    assert align(a, b) == expected
    assert align(b, a) == [(y, x) for x, y in expected]


def test_names_choose_among_pairs_of_the_same_operation_and_shape() -> None:
    a, b = listed("mul p 2", "mul q 2", "mul r 2"), listed("mul q 2", "mul r 3")
    assert align(a, b) == [(a[1], b[0]), (a[2], b[1])]  # of another shape, for want of a better
    unknown = [replace(one, shape=None) for one in b]
    assert align(a, unknown) == [(a[1], unknown[0]), (a[2], unknown[1])]
    assert align(a, []) == align([], b) == [] and align(a, a) == list(zip(a, a, strict=True))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_no_way_to_pair_in_order_pairs_more(first: list[str], second: list[str]) -> None:
    """Against all ways."""

    def most(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        here = 1 + most(i + 1, j + 1) if first[i] == second[j] else 0
        return max(here, most(i + 1, j), most(i, j + 1))

    a, b = (
        listed(*(f"{op} {op}{place} 1" for place, op in enumerate(ops))) for ops in (first, second)
    )
    pairs = align(a, b)
    places = [(a.index(x), b.index(y)) for x, y in pairs]
    assert len(pairs) == most(0, 0) and all(x.op == y.op for x, y in pairs)
    assert all(i < k and j < m for (i, j), (k, m) in pairwise(places))


def numbered(path: Path, more: bool) -> Path:
    """y = norm(tanh(x)), every operation but the last with a number; with an output more, of two
    operations before them."""

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS17)
    def program(x):
        names = (f"var_{number}" for number in count(1))
        x = mb.tanh(x=x, name="start")
        guess = [mb.reduce_sum(x=x, axes=[1], keep_dims=True, name=next(names))] if more else []
        guess = [mb.mul(x=one, y=np.float32(3), name="guess") for one in guess]
        square = mb.mul(x=x, y=x, name=next(names))
        mean = mb.reduce_mean(x=square, axes=[1], keep_dims=True, name=next(names))
        scaled = mb.mul(x=x, y=mb.rsqrt(x=mean, name=next(names)), name=next(names))
        return (mb.mul(x=scaled, y=np.float32(2), name="y"), *guess)

    return saved(program, path)


def test_two_packages_whose_common_outputs_agree_part_nowhere_before_them(tmp_path: Path) -> None:
    a, b = (numbered(tmp_path / f"{more}.mlpackage", more) for more in (False, True))
    result = diff(Side(a), Side(b))
    assert result.same and result.compared == 6 and result.unmatched_a == 0
    assert {(item.side, item.op) for item in result.only} == {("B", "reduce_sum"), ("B", "mul")}


@pytest.mark.parametrize(
    "a, b, relative",
    [
        ([3, 4], [3, 4.5], 0.1),
        ([0, 0], [0, 0], 0),
        ([0, 0], [0, 1], np.inf),
        ([np.nan, 1], [np.nan, 1], 0),
        ([np.nan, 1], [1, 1], np.inf),
        ([np.inf, 1], [np.inf, 1], 0),
        ([np.inf, 1], [5, 1], np.inf),
        ([1, 2], [1, 2, 3], np.inf),
    ],
)
def test_a_difference_is_relative_to_the_first_side(a: list, b: list, relative: float) -> None:
    assert compare(
        describe("add", "x", np.array(a, float)), describe("add", "x", np.array(b, float))
    ).relative == pytest.approx(relative)


def test_random_inputs_are_the_same_for_the_same_seed() -> None:
    features = [Feature("x", TensorType("fp16", (2, 3))), Feature("n", TensorType("int32", (4,)))]
    once, again = random_inputs(features, 7), random_inputs(features, 7)
    assert all(np.array_equal(once[name], again[name]) for name in ("x", "n"))
    assert once["x"].dtype == np.float16 and set(once["n"].tolist()) <= {0, 1}


def test_an_array_file_with_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"is no \.npy file of numbers"):
        read_array(tmp_path / "bad.npy")
    with pytest.raises(UserError, match="no file"):
        read_inputs([f"x={tmp_path / 'absent.npy'}"])
    with pytest.raises(UserError, match="given as NAME=FILE"):
        read_inputs(["x"])


# ---- the commands


def test_diff_reports_in_json_and_exits_with_1_when_something_parts(
    pair: tuple[Path, Path],
) -> None:
    same = CliRunner().invoke(app, ["diff", str(pair[0]), "--json"])
    assert same.exit_code == 0 and json.loads(same.stdout)["same"] is True
    apart = CliRunner().invoke(app, ["diff", *map(str, pair), "--json"])
    assert apart.exit_code == 1 and json.loads(apart.stdout)["first"]["name_a"] == "tilted"
    lines = CliRunner().invoke(app, ["diff", *map(str, pair)])
    assert lines.exit_code == 1 and "first apart: add tilted: relative" in lines.stdout


def test_run_saves_its_outputs_and_a_trace_that_points_at_overflow(tmp_path: Path) -> None:
    path = build(tmp_path / "hot.mlpackage", 0.5, overflow=True)
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    arguments = [
        "run",
        str(path),
        "--input",
        f"x={tmp_path / 'x.npy'}",
        "--output",
        str(tmp_path / "out"),
        "--trace",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    found = {row["name"]: (row["nan"], row["inf"]) for row in document["trace"]}
    assert found["active"] == (0, 0) and found["beyond"] == (0, 4) and found["y"] == (4, 0)
    assert np.load(tmp_path / "out" / "y.npy").shape == (1, 4)
    with np.load(tmp_path / "out" / "trace.npz") as archive:
        assert archive["active"].tolist() == [[2, 2, 2, 2]]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["trace.npz", "y.npy"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0 and "beyond" in table.stdout


def test_run_draws_inputs_from_a_seed_and_picks_a_function(package: Get) -> None:
    arguments = [
        "run",
        str(package("multifunction")),
        "--seed",
        "3",
        "--json",
        "--runtime",
        "reference",
    ]
    outputs = [
        json.loads(CliRunner().invoke(app, [*arguments, "--function", name]).stdout)["outputs"][0][
            "shape"
        ]
        for name in ("decode", "prefill")
    ]
    assert outputs == [[1, 16, 1, 1], [1, 16, 1, 4]]
    missing = CliRunner().invoke(
        app, ["run", str(package("multifunction")), "--runtime", "reference"]
    )
    assert isinstance(missing.exception, UserError) and "needs input 'x'" in str(missing.exception)


# ---- classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("classifiers")

    def build(name: str, labels: list, bias: float) -> Path:
        @mb.program(input_specs=[mb.TensorSpec((1, 3))], opset_version=ct.target.iOS17)
        def program(x):
            return mb.softmax(x=mb.add(x=x, y=np.array([0, bias, 0], np.float32)), axis=-1)

        path = folder / f"{name}.mlpackage"
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,
            classifier_config=ct.ClassifierConfig(labels),
        ).save(str(path))
        return path

    return build


def test_running_a_classifier_shows_and_saves_its_label_and_probabilities(
    classifier: Callable[..., Path], tmp_path: Path
) -> None:
    path, x = classifier("animals", ["cat", "dog", "bird"], 0), np.log([[0.2, 0.5, 0.3]])
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    run = ["run", str(path), "--runtime", "reference", "--input", f"x={tmp_path / 'x.npy'}"]
    shown = CliRunner().invoke(app, [*run, "--output", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "classLabel: dog" in shown.stdout
    document = json.loads(CliRunner().invoke(app, [*run, "--json"]).stdout)
    saved = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert document["labels"] == saved and saved["classLabel"] == "dog"
    assert list(saved["classLabel_probs"]) == ["cat", "dog", "bird"]
    array = np.load(tmp_path / "out" / "classLabel_probs.npy")
    assert list(saved["classLabel_probs"].values()) == array.tolist()
    np.testing.assert_allclose(array, [0.2, 0.5, 0.3], rtol=1e-5)


def test_classifiers_are_compared_by_label_and_by_the_probability_of_each(
    classifier: Callable[..., Path],
) -> None:
    x = {"x": np.array([[0, 1, 2]], np.float32)}
    animals = Side(classifier("a", ["cat", "dog", "bird"], 0))
    same, renamed = ["cat", "dog", "bird"], ["cat", "dog", "fish"]
    for name, labels, bias, least, most in (
        ("same", same, 0, 0, 0),
        ("renamed", renamed, 0, np.inf, np.inf),
        ("biased", same, 0.5, 0.01, 1),
        ("won", same, 2, 0.01, 2),
    ):
        label, probabilities = diff(animals, Side(classifier(name, labels, bias)), x).outputs
        assert label.relative == (np.inf if name in ("renamed", "won") else 0)
        assert least <= probabilities.relative <= most
