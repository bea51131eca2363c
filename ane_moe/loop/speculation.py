"""Self-speculative decoding: the first layers draft some tokens, and the whole model checks them in
one call.

What is generated is what the whole model chooses: a draft that it would not have chosen is thrown
away, and what the caches hold of it is written over. V = vocabulary, T = tokens of a prefill call.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from ane_moe.early_adapters import Adapter, Adapters
from ane_moe.errors import UserError
from ane_moe.loop.cuts import ONE_WAY
from ane_moe.loop.figures import CallClock, SpeculationFigures
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.wiring import Call, Lane, Meeting
from ane_moe.model.port import STREAM


@dataclass(frozen=True)
class SpeculationOptions:
    """`drafts` tokens at a time, by the layers up to and with `exit_layer` (None: a quarter of
    them, at least one)."""

    drafts: int
    exit_layer: int | None = None


class SpeculativeSession(Session):
    """A session whose `decode` drafts what follows the token and checks it along with it: a token
    that was drafted rightly costs no further call."""

    def __init__(
        self,
        shards: LoadedShards,
        options: SpeculationOptions,
        adapters: Adapters | None = None,
        *,
        concurrency: int = 1,
    ) -> None:
        """`adapters` tell from what leaves the exit layer what would leave the last one. Raises
        UserError for a layer that is none, more drafts than a prefill call takes beside a token,
        and a conversion whose states or tracks do not allow it."""
        super().__init__(shards, concurrency=concurrency)
        self._require_possible(options)
        ends = layer_ends(self._decode.body)
        layers = list(ends)
        early = layers[max(1, len(layers) // 4) - 1]
        layer = early if options.exit_layer is None else options.exit_layer
        if layer not in layers[:-1]:
            raise UserError(
                "drafts are not possible after this layer", str(layer), f"one of {layers[:-1]}"
            )
        if adapters and layer not in adapters.exits:
            raise UserError(
                f"the adapters hold none for layer {layer}",
                f"for {sorted(adapters.exits)}",
                "run `ane-moe align` on this conversion",
            )
        steps = self._decode.body.steps[: ends[layer]]
        self._first = replace(self._decode.body, steps=steps)
        self._adapter: Adapter | None = adapters.exits[layer] if adapters else None
        self._drafts = options.drafts
        self._checked: deque[tuple[int, np.ndarray]] = deque()  # drafts, and what follows each
        self.figures.speculation = self._counted = SpeculationFigures(layer)

    def reset(self) -> None:
        super().reset()
        self._checked.clear()

    def _prefilled(self, chunks: Iterable[np.ndarray], tokens: int) -> np.ndarray:
        self._checked.clear()
        return super()._prefilled(chunks, tokens)

    def decode(self, identifier: int) -> np.ndarray:
        self._require([identifier])
        started, clock = perf_counter(), self._decode_clock
        if self._checked and self._checked[0][0] == identifier:
            _, logits = self._checked.popleft()
            self._counted.accepted += 1
        else:
            self._checked.clear()
            drafts = self._draft(identifier, min(self._drafts, self.room - 1), clock)
            logits, *following = self._check([identifier, *drafts], clock)
            self._checked.extend(zip(drafts, following, strict=True))
        self.position += 1
        self._logits[:] = logits
        return self._done(clock, 1, started)

    def _draft(self, identifier: int, count: int, clock: CallClock) -> list[int]:
        """Tokens that may follow, by the first layers alone."""
        lane, drafts = self._decode, [identifier]
        for ahead in range(count):
            self._place(lane, self._rows(drafts[-1:]), self.position + ahead)
            self._first.run(clock)
            if self._adapter:
                stream = lane.slots.columns(STREAM)
                stream[:, 0] = self._adapter(stream[:, 0])
            drafts.append(self._likeliest(clock))
        return drafts[1:]

    def _likeliest(self, clock: CallClock) -> int:
        best, highest = 0, -np.inf
        for rows, scores in self._decode.logits(clock):
            own = int(scores[:, 0].argmax())
            if scores[own, 0] > highest:
                best, highest = rows.start + own, scores[own, 0]
        return best

    def _check(self, ids: Sequence[int], clock: CallClock) -> np.ndarray:
        """Logits `[len(ids), V]` of all of them, by one call of the whole model."""
        logits = np.empty((len(ids), self.manifest.vocab), np.float32)
        self._place(self._prefill, self._rows(ids), self.position)
        self._prefill.body.run(clock)
        self._score(ids, logits, clock)
        self._counted.rounds += 1
        self._counted.drafted += len(ids) - 1
        return logits

    def _require_possible(self, options: SpeculationOptions) -> None:
        shards, tokens = self.shards, self._prefill.tokens
        if not 1 <= options.drafts < tokens or not self.manifest.prefill:
            raise UserError(
                f"{options.drafts} drafts are not possible",
                f"prefill functions take {self.manifest.prefill} tokens",
                "give fewer, or convert with a larger --prefill",
            )
        calls = [call for call in self._prefill.body.calls if isinstance(call, Call)]
        roots = {port.root for call in calls for port in call.entry.ports.inputs}
        if roots & set(ONE_WAY) or shards.tail or shards.manifest.tracks:
            raise UserError(
                f"drafts are not possible with {shards.manifest.family}",
                "states that cannot be taken back, layers for the last token alone, or tracks",
            )


def layer_ends(lane: Lane) -> dict[int, int]:
    """By layer, in order, how many steps of a lane have run when it is through. Raises UserError
    for parallel tracks."""
    ends: dict[int, int] = {}
    for number, step in enumerate(lane.steps, start=1):
        if isinstance(step, Meeting):
            raise UserError("tracks have no hidden state in common between their meetings")
        own = step.shard if isinstance(step, Call) else step
        layers = step.shard.layers if isinstance(step, Call) else ()
        ends[layers[-1] if layers else int(own.layer or 0)] = number
    return ends
