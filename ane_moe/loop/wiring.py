"""The forward pass of any model: calls in order, each with the slots it reads and writes.

What a model is made of is not known here. A call's inputs are filled from slots, and its outputs go
into slots; see `model/port.py` for what they are, `loop/buffers.py` for those that the host fills.
T = tokens in a call.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ane_moe.loop.buffers import Slots, by_channel, zeros
from ane_moe.loop.experts import ExpertDispatch, ExpertLayer
from ane_moe.loop.figures import CallClock
from ane_moe.loop.shards import LoadedShard, Step
from ane_moe.manifest import TAIL, Shard, ShardFunction
from ane_moe.model.port import FFN_INPUT, LOGITS, STATE, STREAM
from ane_moe.runtime.interface import LoadedFunction


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
    the `last`: all of them read the slot as it was, and fp32 is rounded once.
    """

    columns: np.ndarray  # the slot, [C,T]
    total: np.ndarray  # of all shares, fp32
    first: bool
    last: bool
    onto: bool

    def put(self, value: np.ndarray) -> None:
        """Take in one output."""
        if self.first:
            self.total[:] = self.columns if self.onto else 0
        self.total[:] += by_channel(value)
        if self.last:
            self.columns[:] = self.total


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
    states: States

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Predict, and put the outputs where they go; they are returned by name as well."""
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
        return outputs


@dataclass(frozen=True)
class Dispatched:
    """The experts of one layer, called by the host for the tokens that chose them."""

    layer: int
    dispatch: ExpertDispatch
    slots: Slots
    notice: Callable[[int, list[int], np.ndarray], None] | None  # of what was chosen

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Add what the chosen experts give to the stream, or to the slot that they name."""
        count = self.slots.count  # padding chooses nobody
        stream = self.slots.columns(STREAM)[:, :count]
        target = self.slots.columns(self.dispatch.layers[self.layer].target)[:, :count]
        ffn_input = self.slots.columns(FFN_INPUT)[:, :count]
        gates = self.slots.columns(f"gates.{self.layer}")[:, :count]
        chosen = self.dispatch.chosen(self.layer, gates)
        if self.notice:
            self.notice(self.layer, chosen, stream[:, 0])
        total = target.astype(np.float32)
        self.dispatch.add(self.layer, chosen, ffn_input, gates, total, clock)
        target[:] = total
        return {}


@dataclass(frozen=True)
class Lane:
    """What is called for one width, in order, and the slots it all meets in."""

    tokens: int
    slots: Slots
    calls: tuple[Call | Dispatched, ...]

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
        return [call.run(clock) for call in self.calls]


@dataclass(frozen=True)
class Wiring:
    """Makes the lanes of one sequence of tokens."""

    states: States
    dispatch: ExpertDispatch | None = None
    notice: Callable[[int, list[int], np.ndarray], None] | None = None

    def lane(self, steps: Sequence[Step], name: str, slots: Slots) -> Lane:
        """The functions called `name` of `steps`, and their experts, in that order."""
        entries = [_entry(step, name) for step in steps]
        groups = _groups(entries)
        calls: list[Call | Dispatched] = []
        for place, (step, entry) in enumerate(zip(steps, entries, strict=True)):
            if entry is None:
                assert isinstance(step, ExpertLayer) and self.dispatch is not None
                calls.append(Dispatched(step.layer, self.dispatch, slots, self.notice))
            else:
                assert isinstance(step, LoadedShard)
                group = next((group for group in groups if place in group.places), None)
                calls.append(self._call(step, entry, slots, place, group))
        return Lane(next(entry.tokens for entry in entries if entry), slots, tuple(calls))

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
        puts = tuple(self._puts(entry, slots, place, group))
        function = loaded.functions[entry.name]
        return Call(loaded.shard, entry, function, features, passed, puts, self.states)

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
    """Neighbours that put one `slot` together, by their places, and the slots that each of them
    writes."""

    slot: str
    places: list[int]
    onto: bool  # they add to what was there
    written: list[set[str]]
    total: np.ndarray | None = None  # [C,T], once the first of them is wired

    def share(self, place: int, columns: np.ndarray) -> Share:
        """The part in the sum of the call at `place`."""
        if self.total is None:
            self.total = np.zeros(columns.shape, np.float32)
        first, last = place == self.places[0], place == self.places[-1]
        return Share(columns, self.total, first, last, self.onto)

    def is_written_after(self, place: int, slot: str) -> bool:
        """Whether a later one of the neighbours writes the slot too."""
        return any(slot in written for written in self.written[self.places.index(place) + 1 :])


def _entry(step: Step, name: str) -> ShardFunction | None:
    """The function of a shard that is called `name`, or stands in every lane; None for experts,
    which have functions enough."""
    if isinstance(step, ExpertLayer):
        return None
    return next(entry for entry in step.shard.functions if entry.name in (name, TAIL))


def _groups(entries: Sequence[ShardFunction | None]) -> list[_Group]:
    """Neighbours of which one sets a slot and the next ones add to it, or which all add to it."""
    groups: list[_Group] = []
    for slot in dict.fromkeys(
        port.slot for entry in entries if entry for port in entry.ports.outputs
    ):
        open_group: _Group | None = None
        for place, entry in enumerate(entries):
            outputs = {port.slot: port.how for port in entry.ports.outputs} if entry else {}
            if outputs.get(slot) == "add" and open_group and open_group.places[-1] == place - 1:
                open_group.places.append(place)
                open_group.written.append(set(outputs))
            elif slot in outputs:
                open_group = _Group(slot, [place], outputs[slot] == "add", [set(outputs)])
                groups.append(open_group)
    return [group for group in groups if group.onto or len(group.places) > 1]
