"""Labeller: a token classifier's forward pass over one window of tokens. N = tokens of the window,
T = tokens that a function takes, d = d_model.
"""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import Slots
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.figures import CallClock, PhaseFigures
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.wiring import Lane, States, Wiring
from ane_moe.manifest import Shard, length_function
from ane_moe.model.port import MASK, STREAM, band_reach, slot_arguments, slot_rows


def context_each_side(shards: Sequence[Shard]) -> int:
    """Tokens on each side of a token that its scores can depend on: every layer looks as far as its
    band, at tokens that have looked as far before."""
    total = 0
    for shard in shards:
        masks = (port for port in shard.functions[0].ports.inputs if port.root == MASK)
        reaches = (band_reach(slot_arguments(port.slot)[0]) for port in masks)
        total += max((reach or 0 for reach in reaches), default=0) * max(1, len(shard.layers))
    return total


class Labeller:
    """Scores of labels for windows of 1 to L tokens, L the largest of `lengths`.

    A window goes through the functions of the smallest length that holds it; what is left of that
    is padding, which no token sees. `labels` names the scores, in their order; `context_each_side`
    is how far tokens reach: scores of a token with as many on both sides, or with the text's own
    ends nearer, are those of the whole text. `figures` add up all calls.
    """

    def __init__(self, shards: LoadedShards, *, concurrency: int = 1) -> None:
        """`concurrency` dispatched experts of a layer run at once. Raises UserError where the
        conversion labels nothing."""
        manifest = shards.manifest
        if not manifest.labels:
            raise UserError(
                f"{shards.folder} gives no labels",
                f"a conversion of {manifest.family}",
                "give the conversion of a token classifier",
            )
        self.shards, self.manifest = shards, manifest
        self.labels, self.lengths = manifest.labels, manifest.lengths
        self.context_each_side = context_each_side(manifest.shards)
        self.figures = PhaseFigures()
        self.cache_figures = shards.cache.figures if shards.cache else None
        self._states = States(shards.loaded)
        cache = shards.cache
        dispatch = ExpertDispatch(shards.experts, cache, concurrency) if cache else None
        self._wiring = Wiring(self._states, dispatch)
        self._lanes: dict[int, Lane] = {}

    def logits(self, ids: Sequence[int], length: int | None = None) -> np.ndarray:
        """Scores of every label for each of the N tokens, fp32 `[N,labels]`; `length` chooses the
        functions.

        Raises UserError for no tokens, more than the length takes, a length that there is none of,
        and ids outside the vocabulary.
        """
        return self.packed([ids], length)

    def packed(self, texts: Sequence[Sequence[int]], length: int | None = None) -> np.ndarray:
        """`logits` of several texts in one call, one behind the other; they see nothing of each
        other, and have the scores that each has alone.

        Raises UserError as `logits`, of all tokens together.
        """
        ids = [one for text in texts for one in text]
        self._require(ids, length)
        started, count = perf_counter(), len(ids)
        lane = self._lane(length or next(each for each in self.lengths if each >= count))
        lane.slots.place(0, count, tuple(map(len, texts)))
        stream = lane.slots.columns(STREAM)
        stream[:, :count] = self.shards.embed[np.asarray(ids)].T
        stream[:, count:] = 0
        lane.run(CallClock(self.figures))
        scores = np.empty((count, len(self.labels)), np.float32)
        for slot in lane.scores:
            scores[:, slice(*slot_rows(slot))] = lane.slots.columns(slot)[:, :count].T
        self.figures.tokens += count
        self.figures.seconds += perf_counter() - started
        return scores

    def _lane(self, tokens: int) -> Lane:
        """The functions for so many tokens, wired when first called: each length has slots of its
        own."""
        if tokens not in self._lanes:
            slots = Slots(self.shards.ropes)
            name = length_function(tokens)
            self._lanes[tokens] = self._wiring.lane(self.shards.steps, name, slots)
        return self._lanes[tokens]

    def _require(self, ids: Sequence[int], length: int | None) -> None:
        if length is not None and length not in self.lengths:
            there = ", ".join(map(str, self.lengths))
            raise UserError(f"there are no functions for {length} tokens", f"lengths {there}")
        longest = length or self.lengths[-1]
        if not 0 < len(ids) <= longest:
            raise UserError(
                "the tokens do not fit into a window",
                f"{len(ids)} tokens",
                f"give 1 to {longest} at a time, or convert with longer --lengths",
            )
        wrong = next((one for one in ids if not 0 <= one < self.manifest.vocab), None)
        if wrong is not None:
            raise UserError(
                "a token id is outside the vocabulary",
                str(wrong),
                f"ids go from 0 to {self.manifest.vocab - 1}",
            )
