"""docs/models.md says of every mixture of experts in transformers whether it is supported."""

import pytest

from ane_moe.errors import UserError
from ane_moe.families import load_family, supported
from ane_moe.families.missing import ELSEWHERE, MISSING
from scripts.models_table import ROOT, TABLES, rows, with_experts, without_deviations
from tests.models import RESEARCH


def test_every_type_with_experts_is_supported_or_said_to_lack_something() -> None:
    known = [*supported(), *MISSING, *ELSEWHERE]
    assert len(set(known)) == len(known)
    assert set(known) - {*RESEARCH} == with_experts()
    assert {like for like, _ in MISSING.values() if like} <= set(supported())


def test_the_readme_counts_them() -> None:
    assert f"Supported: {len(supported())} model types," in (ROOT / "README.md").read_text()


def test_the_page_is_fresh() -> None:
    fresh = "\n".join(rows())
    assert without_deviations(TABLES.text) == without_deviations(f"{fresh}\n")


@pytest.mark.parametrize("name", MISSING)
def test_the_error_names_the_nearest_family_and_what_is_missing(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_family(name)
    like, lacks = MISSING[name]
    assert lacks in str(caught.value) and like in str(caught.value)
