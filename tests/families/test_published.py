"""Models of papers by name, without a checkpoint or a configuration."""

import pytest

from ane_moe.families import PAPERS, describe_config, published
from ane_moe.forecast.outlook import outlook
from tests.forecast.hub_configs import AFM

NAMES = {
    **{f"pt-{size}-d{depth}": "pt_moe" for size in ("6b", "13b", "30b") for depth in (2, 4, 8)},
    **dict.fromkeys(("mm1-3b", "mm1-7b", "mm1-3b-moe", "mm1-7b-moe"), "mm1_moe"),
    **dict.fromkeys(("omni-12x8", "omni-4x2-4x4-4x8"), "omni_moe"),
    "afm-3b": "afm",
}


@pytest.mark.parametrize(("name", "family"), NAMES.items())
def test_each_name_is_of_a_paper(name: str, family: str) -> None:
    assert describe_config(published(name)).family == family


def test_each_paper_has_a_name() -> None:
    assert {*NAMES.values()} == {*PAPERS}
    assert published("mm1-3b") == published("mm1-3b-moe")
    assert published("afm-3b") == AFM


@pytest.mark.parametrize("name", ["pt-6b-d3", "pt-7b-d4", "omni-0x2", "omni-", "mm1", "demo"])
def test_other_names_are_of_none(name: str) -> None:
    assert published(name) is None


def test_a_plan_takes_the_name() -> None:
    found = outlook("omni-2x4-1x8", recipes=("int8",))
    assert found.supported and found.model_type == "omni_moe"
    assert [choice.routing for choice in found.choices] == ["masked", "sparse"]
