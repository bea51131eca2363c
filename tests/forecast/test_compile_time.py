"""What compiling long chains takes, against the figures of 751K's study (M6, macOS 27)."""

import pytest

from ane_moe.conversion.plan import ConvertOptions
from ane_moe.families import describe_config
from ane_moe.forecast.chips import Range
from ane_moe.forecast.compile_time import chain_seconds, compile_seconds, most_layers
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.outlook import outlook_of
from ane_moe.forecast.planned_facts import elementwise_in_a_row
from ane_moe.forecast.workload import workload_of_plan
from tests.forecast.hub_configs import QWEN3_30B


@pytest.mark.parametrize(("steps", "seconds"), [(32, 0.18), (128, 13.1), (256, 178.6)])
def test_a_chain_takes_what_was_published_on_efficiency_cores(steps, seconds):
    assert chain_seconds(steps, "m6").low == pytest.approx(2.7 * seconds)
    assert chain_seconds(steps, "m4") == Range(0, 0, 0)


def test_the_time_grows_with_the_published_power():
    """3.5, beyond the longest chain."""
    one, two = (chain_seconds(steps, "m6").low for steps in (256, 512))
    assert two / one == pytest.approx(2**3.5)


@pytest.fixture(scope="module")
def kinds():
    options = ConvertOptions(routing="masked", context=2048)
    return plan_kinds(describe_config(QWEN3_30B, "config.json"), options)


def test_a_published_model_compiles_within_the_range(kinds):
    """8 segments of 4 layers: about 80 minutes, which set the high end. A layer of ours has a norm
    each for attention and MLP, that of q, and 5 and 4 steps beside."""
    found = chain_seconds(4 * (8 + 8 + 5 + 8 + 4), "m6")
    assert 8 * found.low < 80 * 60 < 8 * found.high
    attention = next(shard for shard in kinds.plan.shards if shard.kind == "attn")
    (key,) = attention.graphs.values()
    assert elementwise_in_a_row(key) == 8 + 8 + 5  # without the twin of q's norm


def test_every_function_of_every_layer_is_compiled(kinds):
    """48 layers, decode and prefill: by hand, from the chains of the shards of one of them."""
    shards = [(shard, key) for shard in kinds.plan.shards for key in shard.graphs.values()]
    by_hand = sum(
        (48 if shard.layer is not None else 1)
        * 2
        * chain_seconds(elementwise_in_a_row(key), "m6").expected
        for shard, key in shards
    )
    chains = workload_of_plan(kinds.plan, kinds.repeats).chains
    assert compile_seconds(chains, "m6").expected == pytest.approx(by_hand)


def test_layers_of_a_shard_are_limited_where_compiling_explodes(kinds):
    assert most_layers(kinds.plan, "m4", 8) == 8
    limit = most_layers(kinds.plan, "m6", 8)
    assert 1 <= limit < 4  # four took 10 minutes each


def test_plan_has_the_first_load_and_tokens_per_joule():
    """An M6 compiles for longer than an M4, which nobody saw; 18.63 tok/s were 1.91 a joule."""
    slow, quick = (
        outlook_of(QWEN3_30B, recipes=["int8"], target=chip).choices[0] for chip in ("m6", "m4")
    )
    first, other = slow.prediction.first_load_seconds, quick.prediction.first_load_seconds
    assert first.expected > other.expected > quick.prediction.load_seconds.expected
    found = quick.prediction.tokens_per_joule
    ratio = found.expected / quick.prediction.decode.tok_s.expected
    assert 18.63 * ratio == pytest.approx(1.91, rel=0.01)
    assert 0 < found.low < found.expected < found.high
