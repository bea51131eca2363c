"""Shards that work together, fed what the golden says instead of tokens.

N = tokens, C = channels of a slot.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ane_moe.loop.buffers import Ropes, Slots
from ane_moe.loop.experts import ExpertDispatch, ExpertLayer, expert_layers
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.loop.shards import LoadedShard, Step, call_order
from ane_moe.loop.wiring import Call, States, Wiring, meetings
from ane_moe.manifest import TAIL, Manifest, Shard
from ane_moe.model.port import LOGITS, slot_root

Values = Mapping[str, np.ndarray]  # by slot, [N,C]
Stage = tuple[Shard | int, ...]  # dispatched experts by their layer


def stages(manifest: Manifest) -> list[Stage]:
    """What the whole model goes through at once, in the order of calls: the parts of a cut shard,
    whose outputs are added, tracks up to their meeting, and dispatched experts with what chooses
    them."""
    order, experts = call_order(manifest), expert_layers(manifest)
    entries = [
        step.functions[0] if isinstance(step, Shard) else experts[step].entry for step in order
    ]
    on_tracks = {place for places in meetings(entries) for place in places[1:]}
    found: list[Stage] = []
    for place, step in enumerate(order):
        if found and (place in on_tracks or _goes_with(found[-1][-1], step)):
            found[-1] = (*found[-1], step)
        else:
            found.append((step,))
    return found


def alone(steps: Sequence[Step]) -> list[list[LoadedShard] | ExpertLayer]:
    """What of a stage can be told apart by what it gives: tracks can, and experts."""
    found: list[list[LoadedShard] | ExpertLayer] = []
    for step in steps:
        before = found[-1] if found else None
        if isinstance(step, ExpertLayer):
            found.append(step)
        elif isinstance(before, list) and _is_next_part(before[-1].shard, step.shard):
            before.append(step)
        else:
            found.append([step])
    return found


def _goes_with(one: Shard | int, other: Shard | int) -> bool:
    if isinstance(one, int):
        return False
    return isinstance(other, int) or _is_next_part(one, other)


def _is_next_part(one: Shard, other: Shard) -> bool:
    return (one.layer, one.scope, one.rows) == (other.layer, other.scope, other.rows)


@dataclass(frozen=True)
class Outcome:
    """What the functions of a stage wrote, and for each of them whether all of it is finite."""

    values: Values
    finite: tuple[bool, ...]


class StageRun:
    """The functions of a stage on one sequence of tokens; they share what they keep, as in
    generation. Experts among the steps are called for the tokens that choose them, by
    `dispatch`."""

    def __init__(
        self, steps: Sequence[Step], ropes: Ropes, dispatch: ExpertDispatch | None = None
    ) -> None:
        loaded = [step for step in steps if isinstance(step, LoadedShard)]
        self._states = States(loaded)
        wiring = Wiring(self._states, dispatch)
        names = [function.name for function in loaded[0].shard.functions]
        self._lanes = {name: wiring.lane(steps, name, Slots(ropes)) for name in names}
        entries = [one.shard.functions[0] for one in loaded]
        outputs = (port for entry in entries for port in entry.ports.outputs)
        self.reads = {port.slot for port in entries[0].ports.inputs if port.by_channel}
        self._added = [step.target for step in steps if isinstance(step, ExpertLayer)]
        written = [port.slot for port in outputs if port.by_channel] + self._added
        self.writes = list(dict.fromkeys(written))
        inputs = (port for entry in entries for port in entry.ports.inputs)
        # Whether nothing depends on where a token stands or on others: a call may mix sequences.
        alone = len(loaded) == len(steps) and not any(one.shard.states for one in loaded)
        self.by_token = alone and all(port.by_channel for port in inputs)
        self.gives_scores = any(slot_root(slot) == LOGITS for slot in self.writes)
        self.start()

    def start(self, lent: Values | None = None, position: int = 0) -> None:
        """Begin another sequence, or go on at its `position` where nothing is kept; `lent` is what
        other shards have kept of it, as it stands, by slot."""
        self._position = position
        self._states.clear()
        self._states.passed |= lent or {}

    def kept(self, slots: Iterable[str]) -> dict[str, np.ndarray]:
        """Of what these functions keep by inputs and outputs, what stands in such slots."""
        return {slot: self._states.passed[slot] for slot in slots if slot in self._states.passed}

    def go_to(self, position: int) -> None:
        """Go on with the token at `position`; what is kept of those from there on stays."""
        self._position = position

    def whole(self, name: str, values: Values) -> Outcome:
        """`run`, and of prefill what it leaves to a function of the same package for one token, for
        each of them."""
        first, outcome = self._position, self.run(name, values)
        if name != "prefill" or not {name, TAIL} <= self._lanes.keys():
            return outcome
        self.go_to(first)
        last = self.run(TAIL, {slot: outcome.values[slot] for slot in self.reads})
        return Outcome({**outcome.values, **last.values}, last.finite)

    def run(self, name: str, values: Values) -> Outcome:
        """Go on with fp16 `values` in chunks of T, the last one padded."""
        lane = self._lanes[name] if name in self._lanes else self._lanes[TAIL]
        count = len(next(iter(values.values())))
        entries = [call.entry for call in lane.calls if isinstance(call, Call)]
        own = {port.slot for entry in entries for port in entry.ports.outputs}.union(self._added)
        written: dict[str, list[np.ndarray]] = {slot: [] for slot in self.writes if slot in own}
        finite = np.ones(len(lane.calls), bool)
        for first in range(0, count, lane.tokens):
            size = min(lane.tokens, count - first)
            lane.slots.place(self._position, size)
            for slot in self.reads:
                columns = lane.slots.columns(slot)
                columns[:, :size] = values[slot][first : first + size].T
                columns[:, size:] = 0
            outputs = lane.run(CallClock(PhaseFigures()))
            finite &= [all(np.isfinite(value).all() for value in each.values()) for each in outputs]
            for slot, chunks in written.items():
                chunks.append(lane.slots.columns(slot)[:, :size].T.copy())
            self._position += size
        return Outcome(
            {slot: np.concatenate(chunks) for slot, chunks in written.items()}, tuple(finite)
        )
