"""The bytes of a conversion do not change unnoticed."""

from pathlib import Path

import pytest

from tests.conversion.recorded_bytes import CASES, digests, recorded, versions


@pytest.mark.parametrize("name", CASES)
def test_a_conversion_gives_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    if recorded()["versions"] != versions():
        pytest.skip(f"recorded with {recorded()['versions']}")
    assert digests(name, tmp_path) == recorded()["digests"][name]


def test_no_two_conversions_have_the_same_bytes() -> None:
    weights = [digest["weights"] for digest in recorded()["digests"].values()]
    assert len(set(weights)) == len(weights)
