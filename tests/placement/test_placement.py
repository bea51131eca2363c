"""Predicted placement: planted offenders, cost decisions, and the document."""

import io
import json
import re
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from ane_moe.cli import main
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.facts import function_facts
from ane_moe.placement.predicted import predict
from ane_moe.placement.published.backtest import outcomes, table
from ane_moe.placement.published.dispatched import dispatched_outcomes, dispatched_table
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.published.points import packed_experts, swiglu
from ane_moe.placement.targets import find_target
from ane_moe.report.placement_table import placement_report
from tests.placement.offenders import (
    CONTESTED,
    OFFENDERS,
    with_fused_attention,
    with_large_weights,
    with_per_block_weight,
    with_state,
    with_vector_palette,
)

FINDING = {
    "op",
    "op_type",
    "verdict",
    "rule",
    "reason",
    "remedy",
    "source",
    "confidence",
    "against",
    "binding",
}
FUNCTION = {
    "path",
    "function",
    "verdict",
    "ops_total",
    "ops_ane",
    "ops_cpu",
    "ops_gpu",
    "ops_uncertain",
    "cost_share_ane",
    "findings",
}


def predicted(program, target="m4-max", os=26, **options):
    (function,) = predict([(program, "p")], find_target(target, os), **options).functions
    return function


def rules_of(function):
    return {finding.rule for finding in function.findings}


@pytest.mark.parametrize("make", OFFENDERS, ids=lambda make: make.__name__)
def test_a_planted_offender_is_found_by_the_right_rule(tmp_path, make):
    rule, kind = OFFENDERS[make]
    report = predict([(make(tmp_path / "net.mlpackage"), "net")], find_target())
    found = [item for item in report.functions[0].findings if item.rule == rule]
    assert kind in {item.op_type for item in found}
    assert all(item.reason and item.source and item.remedy for item in found)
    assert report.passed == (make in CONTESTED)
    assert {item.verdict for item in found} == {"uncertain" if make in CONTESTED else "cpu"}
    assert all(item.against for item in found) == (make in CONTESTED)


@pytest.mark.parametrize(
    ("make", "rule"),
    [(with_per_block_weight, "per-block-model"), (with_vector_palette, "vector-palette")],
)
def test_one_weight_that_an_m6_refuses_takes_the_whole_function_off(tmp_path, make, rule):
    program = make(tmp_path / "net.mlpackage")
    (found,) = (item for item in predicted(program, "m6").findings if item.rule == rule)
    assert (found.op, found.verdict) == (None, "cpu")
    assert predicted(program, "m6").verdict == "cpu"
    assert rule not in rules_of(predicted(program, "m4"))  # nobody showed it there
    with_plain = with_state(tmp_path / "plain.mlpackage", 256)
    assert rule not in rules_of(predicted(with_plain, "m6"))


def test_a_package_without_an_offender_breaks_no_rule(tmp_path):
    report = predict([(with_state(tmp_path / "net.mlpackage", 256), "net")], find_target())
    assert report.passed and "state-width" not in rules_of(report.functions[0])


def test_what_breaks_on_os_26_is_legal_before(tmp_path):
    path = with_fused_attention(tmp_path / "net.mlpackage")
    assert not predict([(path, "net")], find_target(os=26)).passed
    assert "attention-fused-os-26" not in rules_of(
        predict([(path, "net")], find_target(os=15)).functions[0]
    )


def test_two_gigabytes_of_weights_are_not_read(tmp_path):
    path = with_large_weights(tmp_path / "net.mlpackage", 2 << 30)
    process = psutil.Process()
    before = process.memory_info().rss
    read = process.io_counters().read_chars if psutil.LINUX else 0
    report = predict([(path, "net")], find_target())
    assert process.memory_info().rss - before < 200e6
    assert not psutil.LINUX or process.io_counters().read_chars - read < 50e6
    assert "near-2-gib-m4" in rules_of(report.functions[0])
    assert Path(path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_blocks < 1000


def test_weights_declared_but_not_there_are_counted_by_their_size():
    """The graphs of these tests have no weight file at all; reading one would be an
    AssertionError."""
    facts = function_facts(swiglu(2048, 4096), "main").facts
    assert facts["weight_bytes"] == 3 * 2048 * 4096 * 2 and facts["flops"] == 2 * 3 * 2048 * 4096


def test_no_published_placement_is_predicted_wrong():
    rows = outcomes()
    assert not [row.point.number for row in rows if row.grade == "wrong"]
    points = [row for row in rows if row.point.on_cpu is None]
    assert sum(row.grade == "right" for row in points) >= 37 and len(points) == 46


def test_the_documented_tables_are_those_that_the_predictions_give():
    page = (Path(__file__).parents[2] / "docs" / "placement.md").read_text()
    assert table(outcomes()) in page and dispatched_table(dispatched_outcomes()) in page


def test_an_operation_on_the_cpu_parts_the_graph_and_each_part_is_judged_by_its_own_size():
    g = Graph(weights="fp16")
    large = g.swiglu(g.input("x", (1, 2304, 1, 1)), 9216)
    off = g.op("cumsum", (1, 2304, 1, 1), x=large, axis=1)
    function = predicted(g.program(g.conv(off, 16)))
    verdicts = [op.verdict for op in function.ops]
    assert verdicts == ["ane"] * 5 + ["cpu", "cpu"]
    assert "cost-small" in rules_of(function) and function.verdict == "mixed"
    assert [stretch.verdict for stretch in function.stretches] == ["ane", "cpu"]


def test_what_the_cpu_computes_first_parts_nothing():
    g = Graph(weights="fp16")
    x = g.input("x", (1, 2304, 1, 1))
    mask = g.op(
        "cast",
        (1, 1, 1, 1),
        x=g.op("equal", (1, 1, 1, 1), "bool", x=g.input("i", (1,), "int32"), y=1),
        dtype="fp16",
    )
    function = predicted(g.program(g.same("mul", g.swiglu(x, 9216), mask)))
    assert function.count("ane") == 6


def test_states_tie_what_writes_them_to_what_reads_them():
    """Otherwise a cache would fall into stretches of its own, judged as if they were small
    graphs."""
    g = Graph(weights="fp16")
    x = g.attention(g.input("x", (1, 4096, 1, 64)), 32, 128, 8, 512)
    assert "cost-small" not in rules_of(predicted(g.program(x)))


def test_the_same_graph_may_pass_on_one_chip_and_not_on_another():
    g = Graph(weights="int8")
    program = g.program(g.linear(g.input("x", (1, 1, 20000)), 5000))
    assert predicted(program, "m3-max").broken and not predicted(program, "m4-max").broken


def test_iphones_take_less():
    program = packed_experts(2048, 2048, 16, "fp16")
    big = Graph(weights="int8")
    x = big.input("x", (1, 8192, 1, 1))
    for _ in range(5):
        x = big.swiglu(x, 8192)
    big_program = big.program(x)
    assert "iphone-over-1-gb" in rules_of(predicted(big_program, "iphone-a17"))
    assert "iphone-over-1-gb" not in rules_of(predicted(big_program, "m4-max"))
    assert "iphone-over-1-gb" not in rules_of(predicted(program, "iphone-a17"))


def test_an_operation_no_rule_speaks_of_is_uncertain():
    g = Graph()
    function = predicted(g.program(g.same("some_new_op", g.input("x", (1, 64, 1, 64)))))
    assert [item.rule for item in function.findings if item.op][:1] == ["no-rule"]


def test_allowed_operations_do_not_break_the_gate():
    g = Graph()
    program = g.program(g.same("cumsum", g.same("reduce_prod", g.input("x", (1, 64, 1, 64)))))
    assert predicted(program).broken and not predicted(program, allow=("reduce_prod",)).broken


def test_a_prediction_never_stands_for_a_measurement():
    report = predict([(swiglu(2304, 9216), "p")], find_target(), require_measured=True)
    assert not report.passed and report.source == "predicted"
    assert predict([(swiglu(2304, 9216), "p")], find_target()).passed
    (function,) = report.functions
    assert function.cost_share_ane is None


def test_the_document_has_the_agreed_fields():
    g = Graph()
    program = g.program(g.same("reduce_prod", g.input("x", (1, 64, 1, 64))))
    document = json.loads(
        json.dumps(predict([(program, "a/b.mlpackage")], find_target("m1", 15)).as_json())
    )
    assert (
        document["source"] == "predicted" and document["target"] == "m1" and document["os"] == "15"
    )
    assert document["passed"] is False and document["functions"][0].keys() >= FUNCTION
    assert document["functions"][0]["findings"][0].keys() == FINDING


def test_findings_come_worst_first():
    g = Graph()
    x = g.input("x", (1, 64, 64, 1))
    function = predicted(g.program(g.same("reduce_prod", g.same("equal", x))))
    assert function.findings[0].binding
    assert [item.verdict for item in function.findings] == sorted(
        item.verdict for item in function.findings
    )


def render(report) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(placement_report(report))
    return console.export_text()


def test_the_report_says_that_it_is_a_prediction_and_quotes_both_sides():
    g = Graph()
    x = g.input("x", (1, 64, 64, 1))
    text = render(predict([(g.program(g.same("reduce_prod", x)), "p")], find_target()))
    assert "PREDICTED" in text and "MEASURED" not in text and "nothing was measured" in text
    assert "against it:" in text and "remedy:" in text and "FAILED" in text


def test_a_passing_prediction_reads_as_no_rule_broken():
    text = render(predict([(swiglu(2304, 9216), "p")], find_target()))
    assert "no rule broken" in text and "passed" not in text


def test_many_functions_alike_share_a_line():
    layers = [(swiglu(64, 64), f"moe/layer_{number:02d}.mlpackage") for number in range(45)]
    text = render(predict([*layers, (swiglu(64, 32), "dense/layer_45.mlpackage")], find_target()))
    assert "and 44 alike" in text and "layer_44" not in text and "layer_45" in text
    assert "alike" not in render(predict(layers[:3], find_target()))


@pytest.mark.parametrize(
    ("options", "code"), [(("--target", "m4-max", "--os", "26"), 1), (("--os", "15"), 0)]
)
def test_inspect_predicts_for_the_chip_and_system_asked_for(tmp_path, capsys, options, code):
    path = with_fused_attention(tmp_path / "net.mlpackage")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--placement", "--json", *options])
    assert (ended.value.code or 0) == code
    document = json.loads(capsys.readouterr().out)
    assert document["placement"]["passed"] == (code == 0) and document["functions"]


def test_inspect_names_the_targets_it_knows(tmp_path, capsys):
    path = with_fused_attention(tmp_path / "net.mlpackage")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--placement", "--target", "m99"])
    assert ended.value.code == 2 and re.search("m4-max", capsys.readouterr().err)
    assert read_program(path).functions
