"""The forward pass of any model: calls in order, each with the slots it reads and writes.

What a model is made of is not known here. A call's inputs are filled from slots, and its outputs go
into slots; see `model/port.py` for what they are, `loop/buffers.py` for those that the host fills.
T = tokens in a call.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ane_moe.loop.buffers import Slots, by_channel, zeros
from ane_moe.loop.experts import ExpertDispatch, ExpertLayer
from ane_moe.loop.figures import CallClock
from ane_moe.loop.shards import LoadedShard, Step
from ane_moe.manifest import TAIL, Shard, ShardFunction
from ane_moe.model.port import LOGITS, MEETING, STATE, STREAM, slot_root
from ane_moe.runtime.interface import LoadedFunction

# Told what a layer's gates chose, and of what guesses of later layers are made, where it is there.
Notice = Callable[[int, list[int], np.ndarray | None], None]
# What becomes of a layer's gates [E,T] before its experts are called.
GateRule = Callable[[int, np.ndarray], np.ndarray]


class States:
    """What the shards of one sequence of tokens keep from call to call."""

    def __init__(self, shards: Iterable[LoadedShard]) -> None:
        self._shards = [loaded for loaded in shards if loaded.shard.states]
        self.held: dict[str, Any] = {}  # Core ML's, by package
        self.passed: dict[str, np.ndarray] = {}  # inputs and outputs of the functions, by slot
        self.clear()

    def clear(self) -> None:
        """Begin another sequence."""
        for loaded in self._shards:
            function = next(iter(loaded.functions.values()))
            if loaded.shard.functions[0].ports.states:
                self.held[loaded.shard.path] = function.make_state()
            else:
                self.passed |= zeros(loaded.shard.states)


@dataclass(frozen=True)
class Share:
    """A call's part in a sum: what calls that follow each other put into one slot together.

    The sum begins with what is there (`onto`) or with the `first` output, and fills the slot with
    the `last`, divided by how many `of` them it is the mean: all of them read the slot as it was,
    and the sum is rounded once.
    """

    columns: np.ndarray  # the slot, [C,T]
    total: np.ndarray  # of all shares, fp32, or fp64 where tracks meet
    first: bool
    last: bool
    onto: bool
    of: int

    def put(self, value: np.ndarray) -> None:
        """Take in one output."""
        if self.first:
            self.total[:] = self.columns if self.onto else 0
        self.total[:] += by_channel(value)
        if self.last:
            self.columns[:] = self.total / self.of if self.of > 1 else self.total


@dataclass(frozen=True)
class Into:
    """A slot that one output fills."""

    columns: np.ndarray  # [C,T]

    def put(self, value: np.ndarray) -> None:
        self.columns[:] = by_channel(value)


@dataclass(frozen=True)
class Kept:
    """A state that is an output, and an input of the next call."""

    passed: dict[str, np.ndarray]
    slot: str

    def put(self, value: np.ndarray) -> None:
        self.passed[self.slot] = value


Put = Share | Into | Kept


@dataclass(frozen=True)
class Call:
    """One function of a lane; the arrays behind `features` change, the dictionary does not."""

    shard: Shard
    entry: ShardFunction
    function: LoadedFunction
    features: dict[str, np.ndarray]
    passed: tuple[tuple[str, str], ...]  # inputs that are states: their names and slots
    puts: tuple[tuple[str, Put], ...]  # where outputs go, by name
    met: tuple[tuple[str, Share], ...]  # those that go into a meeting of tracks
    states: States

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Predict, and put the outputs where they go, but for a meeting; they are returned by name
        as well."""
        given = self.features
        if self.passed:
            given = given | {name: self.states.passed[slot] for name, slot in self.passed}
        started = clock.start()
        try:
            outputs = self.function.predict(given, self.states.held.get(self.shard.path))
        finally:
            clock.stop(self.shard.kind, started)
        for name, target in self.puts:
            target.put(outputs[name])
            if isinstance(target, Into):
                clock.copied(outputs[name].nbytes)
        return outputs


@dataclass(frozen=True)
class Dispatched:
    """The experts of one layer, called by the host for the tokens that chose them."""

    layer: int
    dispatch: ExpertDispatch
    slots: Slots
    notice: Notice | None
    met: tuple[tuple[str, Share], ...] = ()  # as of a Call
    gate_rule: GateRule | None = None
    noticed: str = STREAM  # or GUESS

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Add what the chosen experts give to the stream, or to the slot that they name; where
        tracks meet, give it as an output instead."""
        count = self.slots.count  # padding chooses nobody
        table = self.dispatch.layers[self.layer]
        target = self.slots.columns(table.target)
        ffn_input = self.slots.columns(table.source)[:, :count]
        gates = self.slots.columns(f"gates.{self.layer}")[:, :count]
        if self.gate_rule:
            gates = self.gate_rule(self.layer, gates)
        chosen = self.dispatch.chosen(self.layer, gates)
        if self.notice:
            self.notice(self.layer, chosen, self._noticed(table.target))
        total = np.zeros(target.shape) if self.met else target.astype(np.float32)
        self.dispatch.add(self.layer, chosen, ffn_input, gates, total[:, :count], clock)
        if not self.met:
            target[:] = total
        return {name: total[None, :, None] for name, _ in self.met}

    def _noticed(self, target: str) -> np.ndarray | None:
        """Of the first token: the stream that experts add to, or what the layer's shard guesses."""
        if self.noticed == STREAM:
            slot = target if slot_root(target) == STREAM else STREAM
        else:
            slot = f"{self.noticed}.{self.layer}"
        return self.slots.columns(slot)[:, 0] if slot in self.slots else None


@dataclass(frozen=True)
class Meeting:
    """The calls of tracks, and what becomes of their outputs together. Chains of calls know nothing
    of each other, so that they may run at once; the sum is exact, so that no order changes it."""

    calls: tuple[Call | Dispatched, ...]
    chains: tuple[tuple[int, ...], ...]  # places in `calls`
    pool: Executor | None

    def run(self, clock: CallClock) -> list[dict[str, np.ndarray]]:
        """The outputs of each call, by name."""

        def chain(places: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
            return [self.calls[place].run(clock) for place in places]

        given = list((self.pool.map if self.pool else map)(chain, self.chains))
        outputs = {
            place: output
            for places, own in zip(self.chains, given, strict=True)
            for place, output in zip(places, own, strict=True)
        }
        for place, call in enumerate(self.calls):
            for name, share in call.met:
                share.put(outputs[place][name])
        clock.phase.synchronisations += 1
        return [outputs[place] for place in range(len(self.calls))]


@dataclass(frozen=True)
class Lane:
    """What is called for one width, in order, and the slots it all meets in."""

    tokens: int
    slots: Slots
    steps: tuple[Call | Dispatched | Meeting, ...]

    @property
    def calls(self) -> list[Call | Dispatched]:
        """One by one."""
        return [
            call
            for step in self.steps
            for call in (step.calls if isinstance(step, Meeting) else (step,))
        ]

    @cached_property
    def scores(self) -> list[str]:
        """The slots of scores that it fills."""
        outputs = (
            port
            for call in self.calls
            if isinstance(call, Call)
            for port in call.entry.ports.outputs
        )
        return [port.slot for port in outputs if port.root == LOGITS]

    def run(self, clock: CallClock) -> list[dict[str, np.ndarray]]:
        """Call everything once; the outputs by name."""
        outputs: list[dict[str, np.ndarray]] = []
        for step in self.steps:
            given = step.run(clock)
            outputs += given if isinstance(given, list) else [given]
        return outputs


@dataclass(frozen=True)
class Wiring:
    """Makes the lanes of one sequence of tokens. `concurrency` tracks run at once."""

    states: States
    dispatch: ExpertDispatch | None = None
    notice: Notice | None = None
    concurrency: int = 1
    gate_rule: GateRule | None = None
    noticed: str = STREAM

    @cached_property
    def _pool(self) -> Executor | None:
        return ThreadPoolExecutor(self.concurrency, "track") if self.concurrency > 1 else None

    def lane(self, steps: Sequence[Step], name: str, slots: Slots) -> Lane:
        """The functions called `name` of `steps`, and their experts, in that order."""
        entries = [_entry(step, name) for step in steps]
        groups = _groups(entries)
        calls: list[Call | Dispatched] = []
        for place, (step, entry) in enumerate(zip(steps, entries, strict=True)):
            group = next((group for group in groups if place in group.places), None)
            if isinstance(step, ExpertLayer):
                calls.append(self._dispatched(step, slots, place, group))
            else:
                calls.append(self._call(step, entry, slots, place, group))
        tokens = next(entry.tokens for entry in entries if not entry.dispatched)
        return Lane(tokens, slots, tuple(self._steps(entries, calls, groups)))

    def _steps(
        self,
        entries: Sequence[ShardFunction],
        calls: Sequence[Call | Dispatched],
        groups: Sequence["_Group"],
    ) -> Iterator[Call | Dispatched | Meeting]:
        """What runs between two meetings of tracks, up to the second of them, in one."""
        first = 0
        for slot, places in _meetings(groups):
            between = slice(places.start, places.stop)
            yield Meeting(tuple(calls[between]), _chains(entries[between], slot), self._pool)
            first = places.stop
        yield from calls[first:]

    def _dispatched(
        self, step: ExpertLayer, slots: Slots, place: int, group: "_Group | None"
    ) -> Dispatched:
        shares = () if group is None else (group.share(place, slots.columns(group.slot)),)
        met = tuple((port.name, share) for port in step.entry.ports.outputs for share in shares)
        assert self.dispatch is not None
        how = (self.notice, met, self.gate_rule, self.noticed)
        return Dispatched(step.layer, self.dispatch, slots, *how)

    def _call(
        self,
        loaded: LoadedShard,
        entry: ShardFunction,
        slots: Slots,
        place: int,
        group: "_Group | None",
    ) -> Call:
        inputs = entry.ports.inputs
        features = {port.name: slots.array(port) for port in inputs if port.root != STATE}
        passed = tuple((port.name, port.slot) for port in inputs if port.root == STATE)
        puts, met = [], []
        for name, put in self._puts(entry, slots, place, group):
            if group and group.meets and isinstance(put, Share):
                met.append((name, put))
            else:
                puts.append((name, put))
        function = loaded.functions[entry.name]
        return Call(
            loaded.shard, entry, function, features, passed, tuple(puts), tuple(met), self.states
        )

    def _puts(
        self, entry: ShardFunction, slots: Slots, place: int, group: "_Group | None"
    ) -> Iterator[tuple[str, Put]]:
        """Of what neighbours set for one slot, the last one's counts, since the others still read
        it as it was."""
        for port in entry.ports.outputs:
            if port.root == STATE:
                yield port.name, Kept(self.states.passed, port.slot)
            elif group and port.slot == group.slot:
                yield port.name, group.share(place, by_channel(slots.array(port)))
            elif not (group and group.is_written_after(place, port.slot)):
                yield port.name, Into(by_channel(slots.array(port)))


@dataclass
class _Group:
    """Neighbours, or tracks, that put one `slot` together: by their places how they do it, and the
    slots that each of them writes."""

    slot: str
    places: list[int]
    hows: list[str]
    written: list[set[str]]
    total: np.ndarray | None = None  # [C,T], once the first of them is wired

    @property
    def onto(self) -> bool:
        """Whether they add to what was there."""
        return self.hows[0] == "add"

    @property
    def meets(self) -> bool:
        """Whether they are tracks."""
        return any(how in MEETING for how in self.hows)

    @property
    def of(self) -> int:
        """What the sum is divided by: the number of tracks, for their mean."""
        return sum(how != "add" for how in self.hows) if "mean" in self.hows else 1

    def share(self, place: int, columns: np.ndarray) -> Share:
        """The part in the sum of the call at `place`."""
        if self.total is None:
            # Any sum of fp16 is exact in fp64: its numbers are multiples of 2**-24 below 2**16.
            self.total = np.zeros(columns.shape, np.float64 if self.meets else np.float32)
        first, last = place == self.places[0], place == self.places[-1]
        return Share(columns, self.total, first, last, self.onto, self.of)

    def is_written_after(self, place: int, slot: str) -> bool:
        """Whether a later one of the neighbours writes the slot too."""
        return any(slot in written for written in self.written[self.places.index(place) + 1 :])


def _entry(step: Step, name: str) -> ShardFunction:
    """The function of a shard that is called `name`, or stands in every lane; of experts, one that
    stands for all."""
    if isinstance(step, ExpertLayer):
        return step.entry
    return next(entry for entry in step.shard.functions if entry.name in (name, TAIL))


def meetings(entries: Sequence[ShardFunction]) -> list[range]:
    """The places of what tracks call up to each of their meetings."""
    return [places for _, places in _meetings(_groups(entries))]


def _meetings(groups: Sequence[_Group]) -> Iterator[tuple[str, range]]:
    """The slot of each meeting, and the places of all calls since the one before."""
    first = 0
    for group in groups:
        if group.meets:
            yield group.slot, range(first, group.places[-1] + 1)
            first = group.places[-1] + 1


def _groups(entries: Sequence[ShardFunction]) -> list[_Group]:
    """Neighbours of which one sets a slot and the next ones add to it, or which all add to it; and
    tracks that meet in it, whatever lies between them. Dispatched experts are of the latter alone:
    elsewhere they add to the slot as they find it."""
    groups: list[_Group] = []
    given = [{port.slot: port.how for port in entry.ports.outputs} for entry in entries]
    for slot in dict.fromkeys(slot for outputs in given for slot in outputs):
        open_group: _Group | None = None
        meets = any(outputs.get(slot) in MEETING for outputs in given)
        for place, (entry, outputs) in enumerate(zip(entries, given, strict=True)):
            how = outputs.get(slot) if meets or not entry.dispatched else None
            if open_group and (
                how in MEETING or (how == "add" and open_group.places[-1] == place - 1)
            ):
                open_group.places.append(place)
                open_group.hows.append(how)
                open_group.written.append(set(outputs))
            elif how is not None:
                open_group = _Group(slot, [place], [how], [set(outputs)])
                groups.append(open_group)
    shared = [group for group in groups if group.onto or len(group.places) > 1]
    return sorted(shared, key=lambda group: group.places)


def _chains(entries: Sequence[ShardFunction], met: str) -> tuple[tuple[int, ...], ...]:
    """Places of calls that depend on each other, in chains that do not: those of one chain write a
    slot, but for that of the meeting, that others of it read or write."""
    chains: list[list[int]] = []
    for place, entry in enumerate(entries):
        own = [chain for chain in chains if any(_linked(entries[p], entry, met) for p in chain)]
        chains = [chain for chain in chains if chain not in own]
        chains.append(sorted([place, *(earlier for chain in own for earlier in chain)]))
    return tuple(tuple(chain) for chain in sorted(chains))


def _linked(one: ShardFunction, other: ShardFunction, met: str) -> bool:
    reads, writes = [], []
    for entry in (one, other):
        reads.append({port.slot for port in (*entry.ports.inputs, *entry.ports.states)} - {met})
        writes.append({port.slot for port in entry.ports.outputs} - {met})
    return bool(writes[0] & (reads[1] | writes[1]) or writes[1] & reads[0])
