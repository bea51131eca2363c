"""Slots and sums, by hand: what calls read and write, without a model."""

from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace

import numpy as np
import pytest

from ane_moe.errors import UserError
from ane_moe.loop.buffers import HIDDEN, RULES, Slots, by_channel
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.loop.shards import LoadedShard
from ane_moe.loop.wiring import States, Wiring
from ane_moe.manifest import Shard, ShardFunction
from ane_moe.model.port import BY_CHANNEL, STATE, Port, Ports

T, CHANNELS = 3, 2


def column(name, slot, how="set"):
    return Port(name, (1, CHANNELS, 1, T), slot, how)


def shard(path, inputs, outputs, compute, states=()):
    """A shard of one function `go` that computes on a dictionary of arrays, and on its state."""
    entry = ShardFunction("go", T, Ports(tuple(inputs), tuple(outputs), tuple(states)))
    function = SimpleNamespace(
        predict=lambda given, state=None: compute(given, state) if states else compute(given),
        make_state=lambda: {port.name: np.zeros(port.shape, np.float16) for port in states},
    )
    return LoadedShard(Shard(path, "part", 0, (entry,)), {"go": function})


def clock():
    return CallClock(PhaseFigures())


def test_parts_all_read_the_slot_as_it_was_and_round_once():
    def plus(number):
        return lambda given: {"y": (given["x"] + np.float16(number))}

    tiny = np.float16(2**-11)
    hows = {"a": ("set", 1), "b": ("add", tiny), "c": ("add", tiny)}
    parts = [
        shard(path, [column("x", "stream")], [column("y", "stream", how)], plus(number))
        for path, (how, number) in hows.items()
    ]
    slots = Slots({})
    Wiring(States(parts)).lane(parts, "go", slots).run(clock())
    # One by one each would round to nothing beside 1; together they are a step of fp16.
    assert (slots.columns("stream") == np.float16(1 + 2**-10)).all()
    assert np.float16(1) + tiny == np.float16(1)


def test_what_nobody_sets_before_it_is_added_to():
    added = shard(
        "a",
        [column("x", "added")],
        [column("y", "stream", "add")],
        lambda given: {"y": given["x"]},
    )
    slots = Slots({})
    lane = Wiring(States([added])).lane([added], "go", slots)
    slots.columns("stream")[:], slots.columns("added")[:] = 5, 2
    lane.run(clock())
    lane.run(clock())
    assert (slots.columns("stream") == 9).all()


def test_a_sum_that_an_error_cut_short_begins_anew():
    def fails(given):
        raise UserError("no")

    calls = [lambda given: {"y": given["x"] + 1}, fails]
    first = shard(
        "a", [column("x", "stream")], [column("y", "stream")], lambda given: calls[0](given)
    )
    second = shard(
        "b", [column("x", "stream")], [column("y", "stream", "add")], lambda given: calls[1](given)
    )
    slots = Slots({})
    lane = Wiring(States([])).lane([first, second], "go", slots)
    with pytest.raises(UserError):
        lane.run(clock())
    calls[1] = calls[0]
    lane.run(clock())
    assert (slots.columns("stream") == 2).all()


def tracks(numbers, how, cut=True):
    """A block: each track multiplies by its number; the work of odd ones is cut in two."""
    found = []
    for track, number in enumerate(numbers):
        entering, meets = "stream", how if track else "set"
        if cut and track % 2:
            entering = f"stream.track_{track}"
            alone = [column("x", "stream")], [column("y", entering)]
            found.append(shard(f"{track}a", *alone, lambda given: {"y": given["x"]}))
        found.append(
            shard(
                f"{track}b",
                [column("x", entering)],
                [column("y", "stream", meets)],
                lambda given, number=number: {"y": given["x"] * np.float16(number)},
            )
        )
    return found


def met(steps, concurrency=1):
    slots = Slots({})
    lane = Wiring(States([]), concurrency=concurrency).lane(steps, "go", slots)
    slots.columns("stream")[:] = [[1, 2, 3], [-0.001, 5, 1e-7]]
    timed = clock()
    outputs = lane.run(timed)
    assert len(outputs) == len(lane.calls) == len(steps)
    return slots.columns("stream").copy(), timed.phase.synchronisations


@pytest.mark.parametrize("concurrency", [1, 3])
def test_tracks_all_read_the_stream_as_it_was_and_meet(concurrency):
    stream, times = met([*tracks((1, 2, 6), "mean"), *tracks((1, 3), "sum")], concurrency)
    assert stream[0].tolist() == [12, 24, 36] and times == 2
    stream, times = met(tracks((7,), "mean"))
    assert stream[0].tolist() == [7, 14, 21] and times == 0


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_no_order_of_tracks_changes_a_bit(how):
    numbers = np.random.default_rng(0).normal(size=8).astype(np.float16) * np.float16(2) ** (
        np.arange(8) * 4 - 16
    )
    expected, _ = met(tracks(numbers, how))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(8)
        found, _ = met(tracks(numbers[order], how), 1 + seed)
        assert found.tobytes() == expected.tobytes()


def test_all_tracks_of_a_block_are_in_flight_at_once():
    """Each waits until all others have begun."""
    count = 4
    together = Barrier(count, timeout=60)

    def waits(given):
        together.wait()
        return {"y": given["x"]}

    blocks = [
        shard(
            f"{block}.{track}",
            [column("x", "stream")],
            [column("y", "stream", "mean" if track else "set")],
            waits,
        )
        for block in range(2)
        for track in range(count)
    ]
    stream, times = met(blocks, count)
    assert stream[0].tolist() == [1, 2, 3] and times == 2
    with pytest.raises(BrokenBarrierError):
        together = Barrier(count, timeout=0.1)
        met(blocks, count - 1)


def test_the_mean_of_equal_tracks_is_each_of_them():
    for count in range(2, 9):
        assert (
            met(tracks([0.3] * count, "mean"))[0].tobytes()
            == met(tracks([0.3], "mean"))[0].tobytes()
        )


def test_parts_of_a_track_add_to_what_it_gives():
    one = [*tracks((1, 2), "mean", cut=False)]
    more = shard(
        "part", [column("x", "stream")], [column("y", "stream", "add")], lambda g: {"y": g["x"]}
    )
    stream, times = met([one[0], more, one[1], more])
    assert stream[0].tolist() == [2.5, 5, 7.5] and times == 1


def test_a_carry_goes_from_one_shard_to_the_next():
    gives = shard(
        "a",
        [column("x", "stream")],
        [column("y", "stream"), column("r", "carry.router")],
        lambda given: {"y": given["x"], "r": 3 * given["x"]},
    )
    takes = shard(
        "b",
        [column("x", "stream"), column("r_in", "carry.router")],
        [column("y", "stream")],
        lambda given: {"y": given["x"] + given["r_in"]},
    )
    slots = Slots({})
    lane = Wiring(States([])).lane([gives, takes], "go", slots)
    slots.columns("stream")[:] = [[1, 2, 3], [4, 5, 6]]
    lane.run(clock())
    assert slots.columns("stream").tolist() == [[4, 8, 12], [16, 20, 24]]


@pytest.mark.parametrize("explicit", [False, True])
def test_states_stay_from_call_to_call_until_they_are_cleared(explicit):
    kept = Port("s", (1, CHANNELS, 1, T), "state.0.s")

    def compute(given, state=None):
        held = given["s"] if explicit else state["s"]
        now = held + given["x"]
        if explicit:
            return {"y": now, "s_out": now}
        state["s"] = now
        return {"y": now}

    inputs, outputs = [column("x", "stream")], [column("y", "ffn_input")]
    if explicit:
        one = shard("a", [*inputs, kept], [*outputs, Port("s_out", kept.shape, kept.slot)], compute)
    else:
        one = shard("a", inputs, outputs, compute, states=(kept,))
    slots, states = Slots({}), States([one])
    lane = Wiring(states).lane([one], "go", slots)
    slots.columns("stream")[:] = 1
    for expected in (1, 2):
        lane.run(clock())
        assert (slots.columns("ffn_input") == expected).all()
    states.clear()
    lane.run(clock())
    assert (slots.columns("ffn_input") == 1).all()


def test_two_shapes_of_one_slot_are_refused():
    slots = Slots({})
    slots.array(column("x", "stream"))
    with pytest.raises(UserError, match="two shapes"):
        slots.array(Port("x", (1, 5, 1, T), "stream"))


def test_a_slot_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="unknown rotary table"):
        Slots({}).array(Port("cos", (1, 1, 4, T), "rope.other.cos"))
    with pytest.raises(UserError, match="too large"):
        Slots({}).array(Port("x", (1, 1 << 40, 1, T), "stream"))


def test_the_hosts_own_slots_at_a_position():
    ropes = {"rope.main.cos": np.arange(20, dtype=np.float16).reshape(10, 2)}
    slots = Slots(ropes)
    wanted = {
        slot: slots.array(Port("p", shape, slot))
        for slot, shape in {
            "mask.all": (1, 1, 3, 6),
            "mask.2": (1, 1, 3, 6),
            "mask.chunk_3": (1, 1, 3, 6),
            "passed.2": (1, 1, 1, 3),
            "write": (1, 1, 3, 6),
            "keep": (1, 1, 1, 6),
            "rope.main.cos": (1, 1, 2, 3),
            "shift.2": (1, 1, 5, 2),
            "real": (1, 1, 1, 3),
        }.items()
    }
    slots.place(2, 2)  # two real tokens at positions 2 and 3, and one of padding
    h = float(HIDDEN)
    assert wanted["mask.all"][0, 0].tolist() == [
        [0, 0, 0, h, h, h],
        [0, 0, 0, 0, h, h],
        [0, h, h, h, h, h],
    ]
    assert wanted["mask.2"][0, 0].tolist() == [
        [h, 0, 0, h, h, h],
        [h, h, 0, 0, h, h],
        [0, h, h, h, h, h],
    ]
    assert wanted["mask.chunk_3"][0, 0].tolist() == [
        [0, 0, 0, h, h, h],
        [h, h, h, 0, h, h],
        [0, h, h, h, h, h],
    ]
    grown = wanted["passed.2"][0, 0, 0].astype(np.float32)  # one run of two tokens, then two
    assert grown == pytest.approx([0.6931, 1.0986, 0], abs=5e-4)
    assert wanted["write"][0, 0].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    assert wanted["keep"][0, 0, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert wanted["rope.main.cos"][0, 0, :, :2].tolist() == [[4, 6], [5, 7]]
    assert wanted["real"][0, 0].tolist() == [[1, 1, 0]]
    # Of two kept columns and three of the call, the last two that are real: both of the call's.
    assert wanted["shift.2"][0, 0].T.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("count, expected", [(1, [1, 2]), (2, [2, 3]), (3, [3, 4])])
def test_shift_keeps_the_last_real_columns(count, expected):
    slots = Slots({})
    shift = slots.array(Port("p", (1, 1, 5, 2), "shift.2"))
    slots.place(7, count)
    held_and_new = np.arange(5, dtype=np.float16)  # two held, then three of the call
    assert (held_and_new @ shift[0, 0]).tolist() == expected


def test_rules_and_what_functions_fill_are_apart():
    assert not set(RULES) & {*BY_CHANNEL, STATE}
    assert by_channel(np.zeros((1, 4, 7, 1))).shape == by_channel(np.zeros((1, 4, 1, 7))).shape
