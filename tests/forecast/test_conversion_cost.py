"""What a conversion is said to take, against what scripts/bench_convert.py measured."""

import pytest

from ane_moe.conversion.plan import ConvertOptions
from ane_moe.families import describe_config
from ane_moe.forecast.conversion_cost import conversion_memory_bytes, conversion_seconds
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.formats.recipe import find_recipe
from tests.forecast.hub_configs import QWEN3_30B

TWO_LAYERS = describe_config(QWEN3_30B | {"num_hidden_layers": 2}, "config.json")


def kinds(name):
    return plan_kinds(TWO_LAYERS, ConvertOptions(recipe=find_recipe(name)))


# Of two layers, without their graphs and with them (docs/conversion.md): tracing took 5.3 s.
@pytest.mark.parametrize(
    ("name", "seconds"), [("fp16", 12.5), ("int8", 5.3 + 6.9), ("lut4", 5.3 + 16.7)]
)
def test_two_layers_take_what_they_took(name, seconds):
    found = conversion_seconds(kinds(name))
    assert found.expected == pytest.approx(seconds, rel=0.2)
    assert found.low < seconds < found.high


def test_a_format_that_was_never_timed_has_no_time():
    assert conversion_seconds(kinds("lut6")) is None


@pytest.mark.parametrize(("name", "peak_mb"), [("fp16", 547), ("int8", 644), ("lut4", 790)])
def test_memory_is_that_of_all_processes(name, peak_mb):
    assert conversion_memory_bytes(kinds(name).plan) == pytest.approx(peak_mb * 1e6, rel=0.01)


def test_larger_weights_than_those_measured_take_as_much_more_in_each_worker():
    wide = describe_config(QWEN3_30B | {"num_hidden_layers": 1, "hidden_size": 8192}, "config.json")
    options = ConvertOptions(recipe=find_recipe("fp16"))
    plan = plan_kinds(wide, options).plan
    more = plan.largest_weight_bytes - 39e6
    assert more > 0 and conversion_memory_bytes(plan) == pytest.approx(547e6 + 2 * more, rel=0.01)
