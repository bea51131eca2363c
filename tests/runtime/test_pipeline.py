"""Pipelines: their stages are shown, and executed where all of them are ML Programs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.coreml_tools import Model_pb2
from ane_moe.errors import UserError
from ane_moe.mlprogram.reader import read_program
from ane_moe.runtime import load_package
from ane_moe.runtime.reference.diff import Side, diff

Get = Callable[[str], Path]
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
X = np.random.default_rng(0).standard_normal((1, 8, 1, 4)).astype(np.float32)


def changed(source: Path, folder: Path, change: Callable[[object], object]) -> Path:
    """A copy of a package whose `Model` has been changed."""
    path = shutil.copytree(source, folder / "changed.mlpackage")
    model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    change(model)
    (path / MODEL).write_bytes(model.SerializeToString())
    return path


def test_a_pipeline_computes_its_stages_one_after_the_other(package: Get) -> None:
    pipeline = load_package(package("pipeline"), runtime="reference")
    assert [feature.name for feature in pipeline.inputs + pipeline.outputs] == ["x", "z"]
    first = load_package(package("net_ios18_fp16"), runtime="reference")  # the first stage alone
    y = first.predict({"x": X})["y"].astype(np.float32)
    z = pipeline.predict({"x": X})["z"]
    assert z.shape == (1, 8, 1, 4) and z.any()
    np.testing.assert_allclose(z, np.maximum(y[:, :8] - 0.05, 0) * 3, atol=1e-3)


def test_the_intermediates_of_all_stages_are_seen_under_their_stage(package: Get) -> None:
    path = str(package("pipeline"))
    shown = CliRunner().invoke(app, ["run", path, "--seed", "0", "--trace", "--json"])
    names = [row["name"] for row in json.loads(shown.stdout)["trace"]]
    assert names.index("0/y") < names.index("1/z") == len(names) - 1
    result = diff(Side(package("pipeline")), Side(package("pipeline.mlmodelc")))
    assert result.same and result.compared == len(names) and result.worst.relative == 0


def test_an_input_of_a_pipeline_that_does_not_fit_is_named(package: Get) -> None:
    pipeline = load_package(package("pipeline"), runtime="reference")
    with pytest.raises(UserError, match=r"the pipeline needs input 'x'.*fp16 \[1, 8, 1, 4\]"):
        pipeline.predict({})
    with pytest.raises(UserError, match="the pipeline has no input 'y'; its inputs: x"):
        pipeline.predict({"x": X, "y": X})
    with pytest.raises(UserError, match="no function 'second': a pipeline has one"):
        load_package(package("pipeline"), "second", "reference")


@pytest.mark.parametrize("name", ["pipeline", "pipeline.mlmodelc"])
def test_the_stages_of_a_pipeline_are_listed(package: Get, name: str) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(package(name)), "--ops"])
    assert shown.exit_code == 0, shown.output
    for text in (
        "pipeline of  2 models",
        "stage 0      mlProgram",
        "the pipeline",
        "softmax(",
        "z: ",
    ):
        assert text in shown.stdout
    document = json.loads(CliRunner().invoke(app, ["inspect", str(package(name)), "--json"]).stdout)
    assert [stage["kind"] for stage in document["stages"]] == ["mlProgram"] * 2
    assert [feature["name"] for feature in document["inputs"]] == ["x"]
    assert document["stages"][1]["program"]["functions"][0]["outputs"][0]["name"] == "z"


def as_detector(model: object) -> None:
    """The last stage as in a detector's: non-maximum suppression."""
    last = model.pipeline.models[1]
    last.ClearField("mlProgram")
    last.nonMaximumSuppression.iouThreshold = 0.5


def test_a_stage_of_another_kind_is_named_with_what_can_be_done(
    package: Get, tmp_path: Path
) -> None:
    path = changed(package("pipeline"), tmp_path, as_detector)
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "nonMaximumSuppression, not executed here" in shown.stdout and "softmax" in shown.stdout
    with pytest.raises(
        UserError,
        match=r"stage 1 of the pipeline is not executed; found: nonMaximum"
        r"Suppression \(the stages are mlProgram, .*nms=False",
    ):
        load_package(path, runtime="reference")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda model: setattr(model.pipeline.models[1].description.input[0], "name", "w"),
            "does not",
        ),
        (lambda model: model.description.input[0].ClearField("name"), "takes what nothing gives"),
        (
            lambda model: setattr(model.description.output[0], "name", "w"),
            "gives what no stage gives",
        ),
        (lambda model: model.pipeline.models.reverse(), "stage 0 .* takes what nothing gives it"),
    ],
)
def test_a_pipeline_whose_stages_do_not_meet_is_refused(
    package: Get, tmp_path: Path, change: Callable[[object], None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_package(changed(package("pipeline"), tmp_path, change), runtime="reference")


def test_what_needs_one_program_says_that_a_pipeline_is_none(package: Get) -> None:
    for name in ("pipeline", "pipeline.mlmodelc"):
        with pytest.raises(UserError, match="a pipeline; found: stages: mlProgram, mlProgram"):
            read_program(package(name))
