"""What the hidden state is, layer by layer, while a conversion reads a text.

N = tokens, d = d_model, E = experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.figures import CallClock
from ane_moe.loop.session import BodyLane, Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.speculation import layer_ends
from ane_moe.loop.wiring import Dispatched
from ane_moe.model.port import GATES, STREAM
from ane_moe.progress import Progress, silent


@dataclass(frozen=True)
class Residuals:
    """By layer: what its dispatched experts add to, `entering` fp16 `[N,d]`; whether each token
    chose each of them, `chosen` bool `[N,E]`; what leaves the layer, `leaving` fp16 `[N,d]`."""

    entering: dict[int, np.ndarray]
    chosen: dict[int, np.ndarray]
    leaving: dict[int, np.ndarray]


def record_residuals(
    shards: LoadedShards, passages: Sequence[Sequence[int]], progress: Progress = silent
) -> Residuals:
    """Run passages of token ids, each from an empty context. Raises UserError where parallel tracks
    or a tail of layers leave no hidden state of all tokens."""
    if shards.tail:
        raise UserError(
            "not all tokens of a prompt go through all layers", f"{shards.folder}", "take another"
        )
    session = _Listening(shards)
    for number, passage in enumerate(passages):
        progress("reading", number, len(passages))
        session.reset()
        session.prefill(passage)
    return Residuals(_joined(session.entering), _joined(session.chosen), _joined(session.leaving))


class _Listening(Session):
    """A session that keeps what passes through the stream of prefill."""

    def __init__(self, shards: LoadedShards) -> None:
        super().__init__(shards)
        self.entering: dict[int, list[np.ndarray]] = {}
        self.chosen: dict[int, list[np.ndarray]] = {}
        self.leaving: dict[int, list[np.ndarray]] = {}

    def _run(self, lane: BodyLane, clock: CallClock) -> None:
        ends = {steps: layer for layer, steps in layer_ends(lane.body).items()}
        slots, count = lane.slots, lane.slots.count
        stream = slots.columns(STREAM)[:, :count]
        for number, step in enumerate(lane.body.steps, start=1):
            if isinstance(step, Dispatched):
                gates = slots.columns(f"{GATES}.{step.layer}")[:, :count]
                self.chosen.setdefault(step.layer, []).append((gates != 0).T)
                self.entering.setdefault(step.layer, []).append(stream.T.copy())
            step.run(clock)
            if number in ends:
                self.leaving.setdefault(ends[number], []).append(stream.T.copy())


def _joined(parts: dict[int, list[np.ndarray]]) -> dict[int, np.ndarray]:
    return {layer: np.concatenate(own) for layer, own in parts.items()}
