"""The speed of streams: by hand, by the simulation, and as `plan` says it."""

import json
import re

import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.families import describe_config, published
from ane_moe.forecast.chips import find_chip
from ane_moe.forecast.cost_model import breakdown
from ane_moe.forecast.early_cost import early_cost
from ane_moe.forecast.outlook import outlook_of
from ane_moe.forecast.stream_speed import Reading, stream_speed
from ane_moe.forecast.streaming import simulate
from ane_moe.loop.layer_times import LayerTimes
from tests.forecast.hub_configs import OLMOE, QWEN3_30B, QWEN3_235B
from tests.models import make_model

CHIP = find_chip("m4-max")


def plan(config: dict, memory_mb: float, reading: Reading, recipe: str = "int8"):
    return outlook_of(config, recipes=(recipe,), memory_mb=memory_mb, reading=reading)


def test_a_token_takes_its_calls_and_what_it_reads() -> None:
    """Qwen3-30B-A3B as int8: 8 experts of 3 x 2,048 x 768 weights in 48 layers, a scale a row."""
    (found,) = plan(QWEN3_30B, 40_000, Reading(3.0, 0.0)).streams
    weights, scales = 3 * 2048 * 768, 2 * (2 * 768 + 2048)
    record = -(-(weights + scales) // 16_384) * 16_384
    assert found.stored_expert_bytes == record
    assert found.most_read_bytes_per_token == 48 * 8 * record
    assert found.speed.stalled_ms == pytest.approx(48 * 8 * record / 3e9 * 1e3)
    whole = 1e3 / found.speed.in_memory_tok_s.expected + found.speed.stalled_ms
    assert found.speed.tok_s.expected == pytest.approx(1e3 / whole)
    assert found.speed.tok_s.low < found.speed.tok_s.expected < found.speed.tok_s.high


def test_experts_that_are_all_there_are_those_of_sparse_routing_in_fp16() -> None:
    found = plan(QWEN3_30B, 200_000, Reading(), "fp16")
    (sparse,) = [choice for choice in found.choices if choice.routing == "sparse"]
    (fit,) = found.streams
    assert fit.budget.fitting == fit.budget.total and fit.speed.hit_rate == 1
    assert fit.speed.stalled_ms == 0
    assert fit.speed.tok_s == fit.speed.in_memory_tok_s
    expected = breakdown(sparse.workload.decode, CHIP).tok_s
    assert fit.speed.tok_s.expected == pytest.approx(expected.expected)


@pytest.mark.parametrize("hits", [0.0, 0.4, 0.9])
def test_what_it_waits_is_what_the_simulation_waits(hits: float) -> None:
    found = plan(OLMOE, 10_000, Reading(2.0, hits))
    (fit,), (choice, _) = found.streams, found.choices
    read_ms = 4 * fit.stored_expert_bytes / 2.0 / 1e6
    times = LayerTimes(1.0, read_ms, 8, readers=4)
    played = simulate(times, 16, resident=hits, tokens=4000).stalled_ms
    assert fit.speed.stalled_ms == pytest.approx(played, rel=0.02)
    assert choice.workload and fit.speed.hit_rate == hits


def test_as_many_are_called_in_memory_as_stay_where_nothing_else_is_said() -> None:
    found = plan(QWEN3_235B, 64_000, Reading())
    (fit,) = found.streams
    assert fit.speed.hit_rate == fit.budget.fitting / fit.budget.total < 1
    assert found.stream == fit
    slower = plan(QWEN3_235B, 64_000, Reading(0.5)).stream
    assert slower.speed.tok_s.expected < fit.speed.tok_s.expected


def test_plan_says_it_in_a_sentence_and_takes_a_stream_where_nothing_else_fits(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_235B))
    arguments = ["plan", str(path), "--compress", "fp16", "--memory-mb", "60000"]
    more = [*arguments, "--read-gb-s", "6", "--hit-rate", "0.5"]
    result = CliRunner().invoke(app, more)
    assert result.exit_code == 0, result.output
    stream = result.stdout.splitlines()[1]
    assert stream.startswith("In 60,000 MB ") and "predicted, if the disk reads 6 GB/s" in stream
    assert "50% of the experts called are there" in stream
    assert "--routing stream --compress fp16 --target" in result.stdout.splitlines()[-1]
    document = json.loads(CliRunner().invoke(app, [*more, "--json"]).stdout)
    speed = document["streams"][0]["speed"]
    assert speed["kind"] == "predicted" and speed["hit_rate"] == 0.5
    assert document["stream_verdict"].startswith("In 60,000 MB ")
    little = CliRunner().invoke(app, [*arguments[:-1], "1000", "--json"])
    document = json.loads(little.stdout)
    assert document["stream_verdict"] is None and document["streams"][0]["refusal"]


def test_speed_is_of_a_chip_and_a_workload() -> None:
    found = plan(OLMOE, 10_000, Reading())
    workload, disks = found.choices[1].workload, (Reading(gb_s, 0.0) for gb_s in (1, 10))
    slow, fast = (stream_speed(workload, CHIP, 10**8, 16, 8, disk) for disk in disks)
    assert slow.stalled_ms == pytest.approx(100) and fast.stalled_ms == pytest.approx(10)


def test_guesses_cost_their_matrices_and_where_nothing_is_missing_nothing_else() -> None:
    """47 of 48 layers score the 128 experts of the next one, of 2,048 channels."""
    found = plan(QWEN3_30B, 200_000, Reading(recall=0.5), "fp16")
    size, (fit,) = 47 * 128 * 2048 * 2, found.streams
    assert found.early.weight_bytes == size and found.early.layers == 47
    gb_s = CHIP.range("stream_gb_s")
    assert found.early.token_ms.expected == pytest.approx(size / gb_s.expected / 1e6)
    own, guessed = fit.speed.in_memory_tok_s, fit.speed.early_tok_s
    for end in ("low", "expected", "high"):
        more = {"low": "high", "high": "low"}.get(end, end)
        ms = 1e3 / getattr(own, end) + getattr(found.early.token_ms, more)
        assert getattr(guessed, end) == pytest.approx(1e3 / ms)


def test_a_router_with_a_bias_costs_a_number_an_expert_more() -> None:
    config = make_model("glm4_moe", num_hidden_layers=4).config
    found = early_cost(describe_config(config.to_dict(), "config.json"), CHIP)
    assert found.layers == 4 - config.first_k_dense_replace - 1
    each = config.n_routed_experts * (config.hidden_size + 1)
    assert found.weight_bytes == found.layers * 2 * each


def test_guesses_gain_where_most_is_in_memory_and_they_are_right() -> None:
    """A read ahead is one of four at once: what is missing everywhere is read faster on demand."""

    def gain(hits: float, recall: float) -> float:
        speed = plan(QWEN3_30B, 20_000, Reading(6.0, hits, recall)).stream.speed
        return speed.early_tok_s.expected / speed.tok_s.expected

    assert gain(0.9, 1.0) > gain(0.9, 0.8) > 1 > gain(0.9, 0.0)
    assert gain(0.1, 0.5) < 0.9


def test_what_nobody_guesses_is_said(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B))
    asked = ["plan", str(path), "--compress", "int8", "--memory-mb", "20000"]
    assert "with guesses" not in CliRunner().invoke(app, asked).stdout
    shown = CliRunner().invoke(app, [*asked, "--recall", "0.8"]).stdout
    assert "0.52 MB a layer (47 layers)" in shown and "with guesses" in shown
    row = next(line for line in shown.splitlines() if line.startswith("int8 "))
    assert len(re.findall(r"\d[\d.]*-\d[\d.]*-\d[\d.]*(?= |$)", row)) == 2
    path.write_text(json.dumps(published("pt-6b-d4")))
    refused = CliRunner().invoke(app, [*asked, "--recall", "0.8"]).exception
    assert isinstance(refused, UserError) and "not guessed by shards" in str(refused)
    assert "and < 0.001 ms a token" in CliRunner().invoke(app, ["plan", "demo"]).stdout
    path.write_text(json.dumps(QWEN3_30B | {"model_type": "qwen9_moe"}))
    assert CliRunner().invoke(app, [*asked, "--recall", "0.8"]).exit_code == 0  # it says why


@pytest.mark.parametrize(
    "option", [("--hit-rate", "0"), ("--read-gb-s", "17.5"), ("--recall", "0.5")]
)
def test_what_is_assumed_of_streams_is_refused_where_none_is_asked_for(option: tuple) -> None:
    refused = CliRunner().invoke(app, ["plan", "demo", *option]).exception
    assert isinstance(refused, UserError) and f"{option[0]} is of experts" in str(refused)
