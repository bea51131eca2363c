"""Loading ahead where it pays: the rule is fed with known times."""

import pytest

from ane_moe.loop import ahead_rule
from ane_moe.loop.ahead_rule import WARM, AheadRule
from ane_moe.loop.figures import CacheFigures


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""
    now = [0.0]
    monkeypatch.setattr(ahead_rule, "perf_counter", lambda: now[0])
    return now


def watched(clock, *, right, compute=0.002, waited=0.003, read=0.004, contention=0.0):
    """A rule that has seen layers of two guesses, of which so many were right."""
    figures = CacheFigures(loads=10, load_seconds=10 * read)
    rule = AheadRule(figures, 1, contention)
    for _ in range(WARM + 2):
        rule.layer_starts(right, 2)
        clock[0] += compute + waited
        figures.wait_seconds += waited
    return rule


def test_what_is_seen_is_what_was_there(clock):
    times = watched(clock, right=1).times(2)
    assert times.compute_ms == pytest.approx(2.0)
    assert times.read_ms == pytest.approx(4.0)


def test_it_learns_before_it_judges(clock):
    rule = AheadRule(CacheFigures(), 1, 9.0)
    assert rule.pays(2, 0.0)
    for _ in range(WARM + 1):
        rule.layer_starts(0, 2)
        clock[0] += 0.001
    assert not rule.pays(2, 0.0)


def test_right_guesses_pay_and_wrong_ones_do_not(clock):
    assert watched(clock, right=2, compute=0.01).pays(2, 0.0)
    assert not watched(clock, right=0, compute=0.01, contention=0.73).pays(2, 0.0)


def test_nothing_is_gained_by_guessing_what_is_in_memory(clock):
    assert not watched(clock, right=2, compute=0.01).pays(2, 1.0)
