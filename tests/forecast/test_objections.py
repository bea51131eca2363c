"""What speaks against a plan, whichever packages it is of."""

import pytest

from ane_moe.conversion.plan import ConversionPlan, ConvertOptions, sources_of
from ane_moe.conversion.planner import make_plan
from ane_moe.errors import UserError
from ane_moe.families import describe_config
from ane_moe.forecast.aim import aim_of
from ane_moe.forecast.objections import Objections, objections_to
from ane_moe.formats.recipe import find_recipe
from tests.forecast.hub_configs import QWEN3_30B

SPEC = describe_config(QWEN3_30B | {"num_hidden_layers": 1, "num_experts": 8}, "config.json")


def planned(compress: str, **options) -> ConversionPlan:
    chosen = ConvertOptions(recipe=find_recipe(compress), **options)
    return make_plan(SPEC, sources_of(SPEC), chosen)


def test_core_mls_packages_meet_rules_and_core_ais_published_faults():
    target = aim_of("m4-max", 26, False).target
    rules = objections_to(planned("int4-block32"), target)
    assert "per-block-weight" in {one.rule for one in rules.concerns} and not rules.faults
    faults = objections_to(planned("int4-block32", format="aimodel"), target)
    assert not faults.concerns and "coreai-models issue 279" in "".join(faults.faults)


def test_of_other_formats_what_was_said_before_is_not_said_again():
    target = aim_of("m5-max", 26, False).target
    known, final = (objections_to(planned(one), target) for one in ("int8", "int4-channel"))
    assert "stateful-m5" in {one.rule for one in known.concerns}
    told = {one.rule for one in final.beyond(known).concerns}
    assert "int4-per-channel" in told and "stateful-m5" not in told
    assert final.beyond(final) == Objections()
    faults = objections_to(planned("int4-channel", format="aimodel"), target)
    assert faults.beyond(Objections()) == faults and faults.beyond(faults) == Objections()


def test_sizes_and_formats_are_a_named_chips_alone():
    unnamed, named, allowed = (
        aim_of(None, 27, False),
        aim_of("m4", 27, False),
        aim_of("m4", 27, True),
    )
    blocks = find_recipe("int4-block32")
    unnamed.require_formats(blocks)
    allowed.require_formats(blocks)
    with pytest.raises(UserError, match="--allow-cpu"):
        named.require_formats(blocks)
    sparse = ConvertOptions(routing="sparse")
    sizes = [aim.sized(sparse, SPEC, (None, None)) for aim in (unnamed, named)]
    # 0.25 ms a run and 69.6 ps a weight: one expert of 3 x 2048 x 768 weights saves 0.33 ms
    assert [one.experts_per_function for one in sizes] == [1, 1]
    small = describe_config(
        QWEN3_30B | {"num_hidden_layers": 1, "moe_intermediate_size": 160}, "config.json"
    )
    assert named.sized(sparse, small, (None, None)).experts_per_function == 4  # 0.068 ms each
    assert unnamed.sized(sparse, small, (None, None)).experts_per_function == 1
    assert named.sized(sparse, small, ("2", None)).experts_per_function == 2
