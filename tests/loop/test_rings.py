"""Caches that begin anew at their end: what calls write and see, against a list of positions."""

import numpy as np
import pytest

from ane_moe.loop.buffers import Slots
from ane_moe.model.port import Port

WINDOW, TOKENS, SLOTS = 5, 4, 8  # window + tokens - 1: as few as there may be


def ports(slots: Slots, count: int) -> dict[str, np.ndarray]:
    shapes = {
        f"mask.{WINDOW}.ring_{count}": (1, 1, TOKENS, count),
        f"write.ring_{count}": (1, 1, TOKENS, count),
        f"keep.ring_{count}": (1, 1, 1, count),
    }
    arrays = (slots.array(Port("p", shape, slot)) for slot, shape in shapes.items())
    return dict(zip(("mask", "write", "keep"), arrays, strict=True))


def passed(held: list[int], given: dict[str, np.ndarray], positions: list[int]) -> None:
    """Keep and write, as the graph does."""
    keep, write = given["keep"][0, 0, 0], given["write"][0, 0]
    assert not (write[len(positions) :]).any()
    for slot in range(len(held)):
        written = [p for token, p in enumerate(positions) if write[token, slot]]
        assert len(written) + keep[slot] == 1  # one token at most, and none kept beside it
        if written:
            held[slot] = written[0]


@pytest.mark.parametrize("sizes", [[1] * 30, [4] * 7, [3, 4, 1, 1, 2, 4, 4, 1]])
def test_each_token_sees_its_window(sizes: list[int]) -> None:
    slots, held, position = Slots({}), [-1] * SLOTS, 0
    given = ports(slots, SLOTS)
    for size in sizes:
        slots.place(position, size)
        positions = list(range(position, position + size))
        passed(held, given, positions)
        for token, own in enumerate(positions):
            seen = sorted(held[slot] for slot in np.flatnonzero(given["mask"][0, 0, token] == 0))
            assert seen == list(range(max(0, own + 1 - WINDOW), own + 1))
        position += size


def test_fewer_slots_would_not_do() -> None:
    """The first token of a call no longer finds what the others wrote over."""
    slots, held = Slots({}), [-1] * (SLOTS - 1)
    given = ports(slots, SLOTS - 1)
    for position in (0, 4, 8):
        slots.place(position, TOKENS)
        passed(held, given, list(range(position, position + TOKENS)))
    seen = {held[slot] for slot in np.flatnonzero(given["mask"][0, 0, 0] == 0)}
    assert seen != set(range(4, 9))


def test_samples_of_a_token_see_the_window_and_themselves() -> None:
    """Those of a roster are written over by what comes next, and seen by nobody."""
    slots, held = Slots({}), [-1] * SLOTS
    given = ports(slots, SLOTS)
    for position in range(20):
        slots.place(position, TOKENS, roster=True)
        samples = [position, *(1000 + position + sample for sample in range(1, TOKENS))]
        passed(held, given, samples)
        for token, own in enumerate(samples):
            seen = {held[slot] for slot in np.flatnonzero(given["mask"][0, 0, token] == 0)}
            assert seen == {*range(max(0, position + 1 - WINDOW), position), own}
