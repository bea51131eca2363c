"""Measured placement: coremltools' own classes over a stand-in for its native module, with scripted
plans."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ane_moe.cli import main
from ane_moe.errors import UserError
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.check import check_placement
from ane_moe.placement.feedback import COLUMNS, FILE_NAME, FORMAT
from ane_moe.placement.machine import Machine, matching_target
from ane_moe.placement.measured import measure
from ane_moe.placement.measured_child import copy_with_default
from ane_moe.placement.targets import find_target
from ane_moe.runtime.coreml import trial as child
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from tests.placement.test_placement import FUNCTION, render
from tests.standin.fixtures import standin  # noqa: F401
from tests.standin.packages import FUNCTIONS, accumulator, single
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Two functions; never changed."""
    return accumulator(tmp_path_factory.mktemp("packages") / "net.mlpackage")


@pytest.fixture(scope="session")
def one_function(tmp_path_factory):
    return single(tmp_path_factory.mktemp("packages") / "one.mlpackage")


@pytest.fixture
def cache(tmp_path, standin):
    yield ModelCache(tmp_path / "cache")
    child.stop()  # it has this test's script


def measured(package, cache, **options):
    return measure([(package, "net.mlpackage")], cache=cache, **{"numerics": False, **options})


def test_every_function_is_audited_though_a_plan_covers_the_default_one_only(
    package, cache, standin
):
    standin.script(
        plan={
            "default": "engine",
            "rules": [{"function": "prefill", "op": "conv", "device": "cpu"}],
        }
    )
    report = measured(package, cache)
    assert {row.function for row in report.functions} == set(FUNCTIONS)
    decode, prefill = sorted(report.functions, key=lambda row: row.function)
    assert (
        decode.verdict == "ane"
        and not decode.findings
        and decode.count("ane") == len(decode.ops) > 3
    )
    assert prefill.verdict == "mixed" and prefill.count("cpu") == 1
    assert not report.passed and [item.op_type for item in prefill.broken if item.op] == ["conv"]


def test_a_copy_shares_its_weights_and_names_another_default(package, tmp_path):
    copy = copy_with_default(package, "prefill", tmp_path / "audit")
    assert (
        read_program(copy).default_function == "prefill"
        and read_program(package).default_function == "decode"
    )
    weights = "Data/com.apple.CoreML/weights/weight.bin"
    assert os.path.samefile(copy / weights, package / weights)
    assert read_program(copy).functions.keys() == read_program(package).functions.keys()


def test_constants_are_not_counted(package, cache):
    for row in measured(package, cache).functions:
        assert not {"const"} & {op.op_type for op in row.ops}
        assert row.cost_share_ane == pytest.approx(1.0)


def test_all_on_the_engine_passes_and_says_measured(package, cache):
    report = measured(package, cache)
    assert report.passed and report.source == "measured" and report.os == "15.5"
    document = report.as_json()
    assert document["functions"][0].keys() >= FUNCTION and document["source"] == "measured"
    text = render(report)
    assert "MEASURED" in text and "PREDICTED" not in text and "passed" in text


def test_a_convolution_on_the_cpu_fails_unless_it_is_allowed(package, cache, standin):
    standin.script(plan="conv_on_cpu")
    report = measured(package, cache)
    assert {(item.rule, item.op_type) for row in report.functions for item in row.broken} == {
        ("off-engine", "conv"),
        ("cost-share", None),
    }
    assert measured(package, cache, allow=("conv",)).passed


def test_cost_is_a_gate_of_its_own(package, cache, standin):
    standin.script(plan={"default": "engine", "rules": [{"op": "reduce_sum", "device": "cpu"}]})
    report = measured(package, cache)
    assert {item.rule for row in report.functions for item in row.broken} == {"cost-share"}
    assert measured(package, cache, min_cost_share=0.5).passed


@pytest.mark.parametrize(
    ("plan", "rule", "words"),
    [
        ("empty", "empty-plan", "no device"),
        ("no_program", "empty-plan", "no device"),
        ("error", "plan-failed", "scripted plan error"),
        ("crash", "crash", "exit code 3"),
        ("kill", "out-of-memory", "SIGKILL"),
        ("hang", "no-answer", "no answer within"),
    ],
)
def test_a_plan_that_cannot_be_had_is_a_finding_with_its_usual_cause(
    one_function,
    cache,
    standin,
    plan,
    rule,
    words,
):
    standin.script(plan=plan)
    report = measured(one_function, cache, time_limit_seconds=4 if plan == "hang" else 120)
    assert not report.passed
    for row in report.functions:
        (finding,) = row.findings
        assert finding.rule == rule and words in finding.reason and finding.remedy and not row.ops


def test_an_engine_compiler_error_is_named(one_function, cache, standin):
    standin.script(compile="error", messages={"compile": "ANECCompile() FAILED, error code: -14"})
    assert {
        item.rule for row in measured(one_function, cache).functions for item in row.findings
    } == {"engine-compiler-failed"}


def test_a_crash_in_one_function_leaves_the_others_audited(package, cache, standin):
    standin.script(plan={"default": "engine", "fault": "kill", "fault_function": "decode"})
    rows = {row.function: row for row in measured(package, cache).functions}
    assert rows["prefill"].verdict == "ane" and rows["decode"].findings[0].rule == "out-of-memory"


def test_plans_are_kept_by_content(package, cache, standin, tmp_path):
    first = measured(package, cache)
    standin.script(plan="all_cpu")
    assert measured(package, cache) == first
    compiled = [line for line in standin.log() if line.startswith("compile")]
    assert len(compiled) == len(FUNCTIONS)
    other = shutil.copytree(package, tmp_path / "other.mlpackage")
    model = other / "Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(model.read_bytes() + b"\x08\x09")  # the same version once more: other bytes
    assert not measured(other, cache).passed


def test_failures_are_not_kept(one_function, cache, standin):
    standin.script(plan="empty")
    assert not measured(one_function, cache).passed
    standin.script(plan="all_engine")
    assert measured(one_function, cache).passed


def test_cpu_and_engine_are_compared_in_numbers(one_function, cache):
    (row,) = measured(one_function, cache, numerics=True).functions
    assert row.numerics == {"y": {"relative_l2": 0.0, "max_abs_error": 0.0}}


def test_a_crash_at_the_first_prediction_is_a_finding(one_function, cache, standin):
    standin.script(predict="kill")
    (row,) = measured(one_function, cache, numerics=True).functions
    assert row.verdict == "ane" and row.broken[0].rule == "out-of-memory"
    assert "first prediction" in row.broken[0].reason


def test_without_core_ml_there_is_no_measurement(package, tmp_path):
    with pytest.raises(UserError, match="macOS"):
        measure([(package, "net")], cache=ModelCache(tmp_path, os_build="x"))


@pytest.mark.parametrize(
    ("chip", "os", "target", "system"),
    [
        ("m1", "15.5", "m1", 15),
        ("m4-max", "26.1", "m4-max", 26),
        ("m7", "27.0", "m3", 27),
        ("unknown", "unknown", "m3", 26),
        ("m5", "14.2", "m5", 26),
    ],
)
def test_a_machine_is_matched_with_what_the_rules_know(chip, os, target, system):
    found = matching_target(Machine(chip, os), find_target("m3", 26))
    assert (found.name, found.os) == (target, system)


@pytest.fixture(scope="session")
def without_golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_golden")
    return tiny_conversion(tiny_checkpoint("mixtral", folder / "checkpoint"), folder / "out")


@pytest.fixture
def out(without_golden, tmp_path):
    return shutil.copytree(without_golden, tmp_path / "out")


def test_a_conversion_is_measured_compared_and_leaves_feedback(out, cache, standin):
    standin.script(plan="conv_on_cpu")
    report = check_placement(out, find_target(), runtime="coreml", cache=cache, numerics=False)
    assert report.source == "measured" and report.comparison["cost-small"].keys() == set(COLUMNS)
    assert report.comparison["cost-small"]["wrong"] > report.comparison["cost-small"]["right"] > 0
    document = json.loads((out / FILE_NAME).read_text())
    assert document["rules"] == report.comparison and len(document["functions"]) == len(
        report.functions
    )
    assert str(out) not in json.dumps(document) and ".mlpackage" not in json.dumps(document)
    assert "Predictions against this measurement" in render(report)


def refit(path):
    command = [sys.executable, str(ROOT / "scripts" / "refit_placement.py"), str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True)


def test_feedback_tells_what_was_placed_otherwise(tmp_path):
    function = {
        "weight_bytes": 30e6,
        "flops": 3e7,
        "ops": 9,
        "predicted": "cpu",
        "margins_ms": [[-0.1, -0.05]],
        "ops_ane": 9,
        "ops_cpu": 0,
        "ops_gpu": 0,
        "cost_share_ane": 1.0,
    }
    document = {
        "format": FORMAT,
        "chip": "m4-max",
        "os": "26.1",
        "coremltools": "9.0",
        "functions": [function, function | {"predicted": "ane"}],
        "rules": {"cost-small": dict.fromkeys(COLUMNS, 1)},
    }
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(document))
    done = refit(path)
    assert done.returncode == 0 and "cost-small: 1 right" in done.stdout
    assert done.stdout.count("predicted cpu, was ane, margins [[-0.1, -0.05]] ms") == 1
    assert "predicted ane" not in done.stdout
    path.write_text("{}")
    assert refit(path).returncode == 1


def test_measured_and_predicted_documents_do_not_mix(out, cache):
    predicted = check_placement(out, find_target(), runtime="reference").as_json()
    found = check_placement(
        out, find_target(), runtime="coreml", cache=cache, numerics=False
    ).as_json()
    assert predicted["source"] == "predicted" and "predictions_by_rule" not in predicted
    assert all(row["cost_share_ane"] is None for row in predicted["functions"])
    assert found["source"] == "measured"
    assert all(
        item["source"] == "MLComputePlan" for row in found["functions"] for item in row["findings"]
    )


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_verify_predicts_and_fails_where_a_measurement_is_required(out, capsys):
    code, text, err = command(capsys, out, "--compute-plan", "--json", "--runtime", "reference")
    document = json.loads(text)
    assert code == 0 and document["passed"] and document["placement"]["source"] == "predicted"
    assert "only placement" in err
    code, text, _ = command(
        capsys, out, "--compute-plan", "--require-measured", "--runtime", "reference"
    )
    assert code == 1 and "no rule is broken, but a measurement is required" in text


def test_verify_puts_placement_beside_parity(conversion, capsys):
    code, text, _ = command(
        capsys,
        conversion,
        "--compute-plan",
        "--json",
        "--target",
        "m1",
        "--os",
        "15",
        "--runtime",
        "reference",
    )
    document = json.loads(text)
    assert code == 0 and document["shards"] and document["placement"]["target"] == "m1"
    code, text, _ = command(capsys, conversion, "--compute-plan", "--runtime", "reference")
    assert code == 0 and "no rule broken" in text and "PREDICTED" in text
