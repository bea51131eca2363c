"""What to put together, against what was worked out by hand from published estimates."""

import json

import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.forecast.design import design
from ane_moe.placement.targets import find_target
from scripts.placement_design import TABLE, table
from tests.forecast.hub_configs import OLMOE, PRIVACY_FILTER, QWEN3_30B

# One expert in a function for one token, from the estimates that the study of an M4 and an M6
# prints: weights, what a weight saves (69.6 ps on an M4, 59.2 on an M1, 24.7 on an M5), 0.25 ms.
EXPERTS = {
    "qwen3": (QWEN3_30B, 3 * 2048 * 768),
    "olmoe": (OLMOE, 3 * 2048 * 1024),
}
SAVED_PS = {"m1": 59.2, "m4": 69.6, "m5": 24.7, "m6": 69.6}


@pytest.mark.parametrize("chip", SAVED_PS)
@pytest.mark.parametrize("model", EXPERTS)
def test_a_function_takes_as_many_experts_as_the_estimates_ask_for(model, chip):
    config, weights = EXPERTS[model]
    found = design(describe_config(config, "config.json"), find_target(chip, 27))
    saved_ms = weights * SAVED_PS[chip] * 1e-9
    alone = [row for row in found.functions if row.is_one_expert and row.tokens == 1]
    for row in alone:
        assert row.margin_ms[0] == pytest.approx(saved_ms - 0.25, abs=0.005)
        assert row.verdict == ("ane" if saved_ms > 0.25 else "cpu")
    assert alone and found.experts_per_function == int(0.25 / saved_ms) + 1
    assert found.layers_per_shard == 1 and found.stays_on_cpu(64) == ()
    assert ("experts" in found.stays_on_cpu(1)) == (saved_ms < 0.25)


def test_the_documented_table_is_what_the_script_prints():
    assert TABLE.text == f"{table()}\n"


def dry_run(tmp_path, *options):
    arguments = ["convert", "demo", str(tmp_path / "out"), "--dry-run", "--json", *options]
    result = CliRunner().invoke(app, arguments)
    return result, json.loads(result.stdout) if result.exit_code == 0 else {}


def test_convert_takes_its_sizes_from_the_target_where_one_is_named(tmp_path):
    """A layer of the built-in model stays on the CPU alone; three of them do not."""
    _, unnamed = dry_run(tmp_path)
    _, named = dry_run(tmp_path, "--target", "m4")
    _, auto = dry_run(tmp_path, "--layers-per-shard", "auto")
    assert named["shards"] == auto["shards"] and len(named["shards"]) < len(unnamed["shards"])
    _, one = dry_run(tmp_path, "--target", "m4", "--layers-per-shard", "1")
    assert one["shards"] == unnamed["shards"]
    result, _ = dry_run(tmp_path, "--layers-per-shard", "some")
    assert isinstance(result.exception, UserError)


def test_plan_says_what_each_function_would_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    arguments = ["plan", str(tmp_path), "--target", "m5", "--os", "27", "--compress", "int8"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "experts, 1 expert" in shown and "--experts-per-function 3" in shown
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["design"]["experts_per_function"] == 3
    assert document["design"]["kind"] == "predicted"


@pytest.mark.parametrize(("lengths", "fewest"), [(None, 32), ((64, 256), 64)])
def test_an_encoder_is_designed_for_its_shortest_windows(lengths, fewest):
    spec = describe_config(PRIVACY_FILTER, "config.json")
    found = design(spec, find_target("m4", 27), lengths=lengths)
    saved_ms = 3 * 640 * 640 * SAVED_PS["m4"] * 1e-9
    assert found.experts_per_function == int(0.25 / saved_ms) + 1
    masked = [row for row in found.functions if row.routing == "masked"]
    assert min(row.tokens for row in masked) == fewest
    assert "moe" not in found.stays_on_cpu(fewest) and "experts" in found.stays_on_cpu(1)
    assert found.layers_per_shard == 1
