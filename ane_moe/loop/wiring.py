"""The forward pass of any model: calls in order, each with the slots it reads and writes.

What a model is made of is not known here. A call's inputs are filled from slots, and its outputs go
into slots; see `model/port.py` for what they are, `loop/buffers.py` for those that the host fills.
T = tokens in a call.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ane_moe.loop.buffers import Slots, by_channel, zeros
from ane_moe.loop.experts import ExpertDispatch, ExpertLayer
from ane_moe.loop.figures import CallClock
from ane_moe.loop.shards import LoadedShard, Step
from ane_moe.manifest import Shard, ShardFunction
from ane_moe.model.port import FFN_INPUT, LOGITS, STATE, STREAM, Port
from ane_moe.runtime.interface import LoadedFunction


class States:
    """What the shards of one sequence of tokens keep from call to call."""

    def __init__(self, shards: Iterable[LoadedShard]) -> None:
        self._shards = [loaded for loaded in shards if loaded.shard.states]
        self.held: dict[str, Any] = {}              # Core ML's, by package
        self.passed: dict[str, np.ndarray] = {}     # inputs and outputs of the functions, by slot
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

    columns: np.ndarray                             # the slot, [C,T]
    total: np.ndarray                               # of all shares, fp32
    first: bool
    last: bool
    onto: bool

    def put(self, value: np.ndarray) -> None:
        """Take in one output `[C,T]`."""
        if self.first:
            self.total[:] = self.columns if self.onto else 0
        self.total[:] += value
        if self.last:
            self.columns[:] = self.total


@dataclass(frozen=True)
class Call:
    """One function of a lane; the arrays behind `features` change, the dictionary does not."""

    shard: Shard
    entry: ShardFunction
    function: LoadedFunction
    features: dict[str, np.ndarray]
    shares: dict[str, Share]                        # by slot, where it is not alone
    slots: Slots
    states: States

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Predict, and put the outputs where they go; they are returned by name as well."""
        passed = {port.name: self.states.passed[port.slot] for port in self.entry.ports.inputs
                  if port.root == STATE}
        started = clock.start()
        try:
            outputs = self.function.predict(self.features | passed, self.states.held.get(self.shard.path))
        finally:
            clock.stop(self.shard.kind, started)
        for port in self.entry.ports.outputs:
            self._put(port, outputs[port.name])
        return outputs

    def _put(self, port: Port, value: np.ndarray) -> None:
        if port.root == STATE:
            self.states.passed[port.slot] = value
        elif share := self.shares.get(port.slot):
            share.put(by_channel(value))
        else:
            self.slots.columns(port.slot)[:] = by_channel(value)


@dataclass(frozen=True)
class Dispatched:
    """The experts of one layer, called by the host for the tokens that chose them."""

    layer: int
    dispatch: ExpertDispatch
    slots: Slots
    notice: Callable[[int, list[int], np.ndarray], None] | None     # of what was chosen

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        """Add what the chosen experts give to the stream."""
        count = self.slots.count                    # padding chooses nobody
        stream = self.slots.columns(STREAM)[:, :count]
        ffn_input = self.slots.columns(FFN_INPUT)[:, :count]
        gates = self.slots.columns(f"gates.{self.layer}")[:, :count]
        chosen = self.dispatch.chosen(gates)
        if self.notice:
            self.notice(self.layer, chosen, stream[:, 0])
        total = stream.astype(np.float32)
        self.dispatch.add(self.layer, chosen, ffn_input, gates, total, clock)
        stream[:] = total
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
        outputs = (port for call in self.calls if isinstance(call, Call) for port in call.entry.ports.outputs)
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
        shares = _shares(entries, slots)
        calls: list[Call | Dispatched] = []
        for step, entry, own in zip(steps, entries, shares, strict=True):
            if entry is None:
                assert isinstance(step, ExpertLayer) and self.dispatch is not None
                calls.append(Dispatched(step.layer, self.dispatch, slots, self.notice))
            else:
                assert isinstance(step, LoadedShard)
                calls.append(self._call(step, entry, own, slots))
        return Lane(next(entry.tokens for entry in entries if entry), slots, tuple(calls))

    def _call(self, loaded: LoadedShard, entry: ShardFunction, shares: dict[str, Share], slots: Slots) -> Call:
        features = {port.name: slots.array(port) for port in entry.ports.inputs if port.root != STATE}
        for port in entry.ports.outputs:
            if port.root != STATE:
                slots.array(port)
        return Call(loaded.shard, entry, loaded.functions[entry.name], features, shares, slots, self.states)


def _entry(step: Step, name: str) -> ShardFunction | None:
    """The function of a shard that is called `name`; None for experts, which have functions enough."""
    if isinstance(step, ExpertLayer):
        return None
    return next(entry for entry in step.shard.functions if entry.name == name)


def _shares(entries: Sequence[ShardFunction | None], slots: Slots) -> list[dict[str, Share]]:
    """The part of each call in sums, by slot."""
    shares: list[dict[str, Share]] = [{} for _ in entries]
    outputs = [port for entry in entries if entry for port in entry.ports.outputs]
    for added in {port.slot: port for port in outputs if port.how == "add"}.values():
        columns = by_channel(slots.array(added))
        for places, onto in _runs(entries, added.slot):
            total = np.zeros(columns.shape, np.float32)
            for place in places:
                first, last = place == places[0], place == places[-1]
                shares[place][added.slot] = Share(columns, total, first, last, onto)
    return shares


def _runs(entries: Sequence[ShardFunction | None], slot: str) -> list[tuple[list[int], bool]]:
    """Places of neighbours that write `slot` together, and whether they add to what was there."""
    runs: list[tuple[list[int], bool]] = []
    for place, entry in enumerate(entries):
        outputs = entry.ports.outputs if entry else ()
        how = next((port.how for port in outputs if port.slot == slot), None)
        if how == "add" and runs and runs[-1][0][-1] == place - 1:
            runs[-1][0].append(place)
        elif how:
            runs.append(([place], how == "add"))
    return [(places, onto) for places, onto in runs if onto or len(places) > 1]
