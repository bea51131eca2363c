"""Other projects' suites over the stand-in: they do compare, and failures are told by kind."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb

from ane_moe.coreml_tools import ct
from tests.by_hand.foreign_suites import kind, read_report
from tests.standin.fixtures import standin as standin

SUITE = """
import pytest

@pytest.fixture
def broken(): raise OSError("no such device")

def test_passes(): pass
def test_is_skipped(): pytest.skip("not here")
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
@pytest.mark.parametrize("name, size", [("a", 3), ("b2", 41)])
def test_fails(name, size): raise ValueError(f"input '{name}' has size {size}")
def test_has_no_fixture(broken): pass
"""


@pytest.fixture
def comparison(standin):
    """coremltools' compare_backend, from a module that was imported under the stand-in."""
    name = "coremltools.converters.mil.testing_utils"
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compare_backend


def relu():
    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS16)
    def program(x):
        return mb.relu(x=x, name="y")

    return ct.convert(
        program, compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS16
    )


def test_coremltools_comparison_predicts_and_rejects_a_wrong_output(comparison, standin):
    x = np.array([[-1, 0, 2, 3]], np.float32)
    wanted = {"y": np.array([[0, 0, 2, 3]], np.float32)}
    model = relu()
    comparison(model, {"x": x}, wanted)
    assert standin.log().count("predict main") == 1
    standin.script(predict="wrong")
    with pytest.raises(AssertionError, match="Mismatched elements: 4 / 4"):
        comparison(model, {"x": x}, wanted)


def test_messages_that_differ_in_names_and_numbers_are_of_one_kind():
    native = 'RuntimeError: {{\n    NSLocalizedDescription = "{}";\n}}'
    first = native.format("input 'x1' of function 'main' is fp16 [1, 4]; found: shape [4]")
    second = native.format("input 'mask' of function 'f' is fp16 [1, 12, 3]; found: shape [9]")
    assert kind(first) == "input '...' of function '...' is fp16 [N, ...]; found: shape [N]"
    assert kind(second) == kind(first)
    assert kind(native.format("input 'x1' of function 'main' is int32")) != kind(first)
    with pytest.raises(AssertionError) as wrong:
        np.testing.assert_allclose(np.zeros(3), np.arange(3.0), rtol=1e-3)
    assert kind(f"AssertionError: {wrong.value}") == (
        "AssertionError: Not equal to tolerance rtol=N, atol=N"
    )


def test_every_outcome_that_pytest_reports_is_counted_once(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    report = tmp_path / "report.xml"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            "--junitxml",
            str(report),
            "test_suite.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    result = read_report(report, predictions=1)
    assert (result.passed, result.skipped, result.failed) == (1, 2, 3)
    counts = {text: len(tests) for text, tests in result.failures.items()}
    assert counts["ValueError: input '...' has size N"] == 2
    assert not result.good
