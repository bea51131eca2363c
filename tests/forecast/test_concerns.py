"""What the placement rules say of a conversion before there is a package."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.conversion.plan import ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.families import describe_config
from ane_moe.forecast import concerns
from ane_moe.forecast.concerns import Concern, concerns_of_plan
from ane_moe.formats.recipe import find_recipe
from ane_moe.placement.rules import RuleBook, load_rules
from ane_moe.placement.targets import find_target
from tests.forecast.hub_configs import PRIVACY_FILTER, QWEN3_30B

SPEC = describe_config(QWEN3_30B | {"num_hidden_layers": 2, "num_experts": 8}, "config.json")
FILTER = describe_config(PRIVACY_FILTER, "config.json")


def of_options(target: str = "m4-max", os: int = 26, spec=SPEC, **options) -> list[Concern]:
    """Without those that depend on how much work a function has."""
    plan = make_plan(spec, sources_of(spec), ConvertOptions(**options))
    sizes = {rule.id for rule in load_rules() if rule.scope == "segment"}
    found = concerns_of_plan(plan, find_target(target, os))
    return [one for one in found if one.rule.removeprefix("new-") not in sizes]


def rules_met(target: str = "m4-max", os: int = 26, compress: str = "int8", **options) -> set[str]:
    found = of_options(target, os, recipe=find_recipe(compress), **options)
    return {concern.rule for concern in found}


@pytest.mark.parametrize("compress", ["lut4", "lut4+scale", "tiny", "small", "sparse50+lut4"])
def test_palettes_are_warned_of_from_os_26_on(compress):
    assert "palette-os-26" in rules_met(os=26, compress=compress)
    assert "palette-os-26" not in rules_met(os=15, compress=compress)


def test_formats_that_a_rule_takes_off_the_engine_are_warned_of():
    assert "per-block-weight" in rules_met(compress="int4-block32")
    assert "int4-per-channel" in rules_met(compress="int4-channel")
    assert (
        rules_met(compress="int8", state="explicit")
        == rules_met(compress="fp16", state="explicit")
        == set()
    )


def test_states_are_warned_of_unless_the_caches_are_inputs():
    assert rules_met("m5-max") == {"stateful-m5", "state-access"}
    assert rules_met("m5-max", os=15) == {"state-access"}
    assert rules_met("m5-max", state="explicit") == set()
    assert "many-states-iphone" in rules_met("iphone-a17", layers_per_shard=2)


def test_an_encoder_has_no_states_to_be_warned_of():
    assert of_options("m5-max", spec=FILTER) == []


def test_tokens_on_an_axis_before_a_last_one_of_1_are_warned_of():
    assert rules_met(state="explicit", layout="bct1") == {"singleton-last-axis"}
    assert rules_met(state="explicit", layout="bct1", prefill=0) == set()


def test_a_rule_that_is_not_in_the_file_is_not_warned_of(monkeypatch):
    """Concerns come from the rules alone: under other names and reasons they are the others."""
    rules = (rule for rule in load_rules() if rule.id != "state-access")
    kept = tuple(replace(rule, id=f"new-{rule.id}") for rule in rules)
    monkeypatch.setattr(concerns, "rule_book", lambda target: RuleBook(kept, target))
    assert rules_met("m5-max", compress="lut4") == {"new-palette-os-26", "new-stateful-m5"}


def test_a_warning_quotes_both_sides_and_says_what_to_do_instead():
    (lut4,) = of_options(recipe=find_recipe("lut4"))
    assert lut4.verdict == "uncertain" and lut4.state == "undecided"
    assert "against it: " in lut4.sentence and "instead: int8" in lut4.sentence


def test_convert_warns_on_stderr_and_in_the_document(tmp_path):
    arguments = [
        "convert",
        "demo",
        str(tmp_path / "out"),
        "--compress",
        "tiny",
        "--dry-run",
        "--json",
    ]
    result = CliRunner().invoke(app, [*arguments, "--target", "m5-max", "--os", "26"])
    told = json.loads(result.stdout)["concerns"]
    found = {concern["rule"] for concern in told}
    assert found >= {"palette-os-26", "stateful-m5", "state-access"}
    assert any(concern["function_bytes"] for concern in told)  # the demo's functions are small
    warnings = [
        line for line in result.stderr.splitlines() if line.startswith("ane-moe: warning: ")
    ]
    assert len(warnings) == len(told) and all("m5-max under OS 26" in line for line in warnings)
    assert all(any(rule in line for line in warnings) for rule in found)
