"""`verify --precision engine`: the engine's arithmetic beside exact sums, said to be predicted."""

import io
import json

import pytest
from rich.console import Console

from ane_moe.cli import main
from ane_moe.report.verify_table import verify_report
from ane_moe.runtime.reference.engine import arithmetic, fixed_point
from ane_moe.verification.verify import verify


@pytest.fixture(scope="module")
def report(conversion):
    return verify(conversion, precision="engine")


def shown(report) -> str:
    console = Console(width=400, file=io.StringIO())
    console.print(verify_report(report))
    return console.file.getvalue()


def test_a_sound_conversion_passes_and_costs_little(report):
    assert report.passed and report.engine is not None
    for row in report.engine.models:
        assert 0 < row.mean_kl_exact < row.mean_kl_engine < 1e-4
        assert row.perplexity_engine == pytest.approx(row.perplexity_golden, rel=1e-3)
    assert [row.layer for row in report.engine.routing] == [0]


def test_what_stands_beside_it_is_the_proof_with_exact_sums(report, conversion):
    exact = verify(conversion)
    assert exact.engine is None
    assert [row.mean_kl_exact for row in report.engine.models] == [
        row.mean_kl for row in exact.models
    ]
    assert [row.mean_kl_engine for row in report.engine.models] == [
        row.mean_kl for row in report.models
    ]


def test_every_product_of_every_function_is_there(report):
    sums = [row for row in report.engine.operations if row.terms]
    assert {row.layer for row in sums} == {0, 1, None}
    assert {row.function for row in sums} == {"decode", "prefill"}
    assert {row.op for row in sums} == {"conv", "matmul"}
    for row in sums:
        assert 0 < row.largest_result <= row.largest_partial * 1.001
        assert row.largest_partial <= row.largest_possible * 1.001 < row.limit
        assert row.safe_input > row.largest_input and 0 <= row.dropped_share < 1
    assert 0 < report.engine.dropped_share < 0.1


def test_it_is_shown_as_predicted(report, conversion, capsys):
    text = shown(report)
    assert text.startswith("Predicted, not measured")
    assert "M4, M6 (macOS 27)" in text and "Predicted routing" in text
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(conversion), "--precision", "engine", "--json"])
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)["engine"]
    assert document["predicted"] and document["chips"] == ["m4", "m6"]
    assert {"on_the_way", "at_risk", "dropped_share"} <= document["operations"][0].keys()


def test_an_overflow_fails_and_is_named(conversion, monkeypatch):
    for module in (fixed_point, arithmetic):
        monkeypatch.setattr(module, "LIMIT", 1.0)
    report = verify(conversion, precision="engine")
    assert not report.passed and report.cause == "engine"
    overflowing = report.engine.overflowing
    assert overflowing and report.engine.exact_failures == 0
    assert any(row.on_the_way for row in overflowing)
    assert all(row.at_risk >= row.overflows > 0 for row in overflowing)
    for row in overflowing:
        assert row.largest_partial / row.harmless_divisor < row.limit
        assert row.largest_partial / row.harmless_divisor >= row.limit / 2
    text = shown(report)
    assert "predicted to overflow at" in text and "with exact sums the same shards pass" in text


def test_text_is_generated_by_it_too(conversion, capsys):
    arguments = ["generate", str(conversion), "--prompt-ids", "1,2,3", "--max-tokens", "2"]
    for precision in ("fp32", "engine"):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--precision", precision, "--json"])
        assert not ended.value.code
        assert len(json.loads(capsys.readouterr().out)["ids"]) == 2
