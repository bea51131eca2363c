"""The rotating part of the widest sweeps: every test of them is in just one part."""

import pytest

from tests.slow_set import SlowSet, parse_slow

TESTS = [f"tests/some.py::test_it[{number}]" for number in range(200)]


@pytest.mark.parametrize("parts", [1, 4, 7])
def test_every_test_is_of_one_part(parts: int) -> None:
    sets = [parse_slow(f"{day}/{parts}") for day in range(20_000, 20_000 + parts)]
    for test in TESTS:
        assert sum(one.holds(test) for one in sets) == 1
    counts = [sum(one.holds(test) for test in TESTS) for one in sets]
    assert min(counts) > len(TESTS) / parts / 2


def test_without_the_option_there_are_none_and_all_are_all() -> None:
    assert not any(parse_slow(None).holds(test) for test in TESTS)
    assert all(parse_slow("all").holds(test) for test in TESTS)
    assert parse_slow("9/4") == SlowSet(1, 4)
    assert [str(parse_slow(text)) for text in (None, "all", "9/4")] == [
        "none",
        "all",
        "part 1 of 4",
    ]


@pytest.mark.parametrize("text", ["", "some", "1/0", "1", "-1/4", "1/4/2"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--slow is"):
        parse_slow(text)
