"""Session: the token loop. Embeds, runs the lanes, keeps the position, returns logits.

T = tokens in a call, V = vocabulary, d = d_model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.ahead_rule import AheadRule
from ane_moe.loop.buffers import Slots
from ane_moe.loop.cuts import ONE_WAY, cuts_of
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.figures import CallClock, Figures, PrefetchFigures
from ane_moe.loop.prefetch import Guessing, Prefetch, make_predictor, settled
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.wiring import Call, GateRule, Lane, States, Wiring
from ane_moe.manifest import TAIL
from ane_moe.model.port import STREAM, Port, slot_rows


@dataclass(frozen=True)
class BodyLane:
    """Everything for calls of one width: the layers, and the head."""

    body: Lane
    head: Lane

    @property
    def tokens(self) -> int:
        return self.body.tokens

    @property
    def slots(self) -> Slots:
        return self.body.slots

    @property
    def inputs(self) -> list[Port]:
        """What the functions of the layers take."""
        calls = (call for call in self.body.calls if isinstance(call, Call))
        return [port for call in calls for port in call.entry.ports.inputs]

    def logits(self, clock: CallClock) -> Iterator[tuple[slice, np.ndarray]]:
        """Scores `[rows,T]` of each slice of the vocabulary for what the stream holds."""
        self.head.run(clock)
        for slot in self.head.scores:
            yield slice(*slot_rows(slot)), self.slots.columns(slot)


class Halted(Exception):
    """A prompt was not taken in to its end, by the wish of whoever asked for it."""


class Session:
    """One conversation with the shards: its own caches and position over weights that sessions
    share.

    Logits are fp32 and, but for `prefill_logits`, one read-only array that the next call
    overwrites: copy to keep.
    """

    def __init__(
        self,
        shards: LoadedShards,
        *,
        concurrency: int = 1,
        predictor: str | Guessing = "none",
        figures: Figures | None = None,
    ) -> None:
        """`concurrency` dispatched experts of one layer, or tracks, run at once (the results do not
        depend on it), and `predictor` (a key of prefetch.PREDICTORS, or more about it; AUTO: the
        shards, where they guess) chooses the experts loaded ahead; `figures` are those of several
        sessions together. Raises UserError for an encoder, and as `settled` does."""
        if shards.manifest.lengths:
            raise UserError(
                f"{shards.folder} takes whole texts, and generates none",
                f"a conversion of {shards.manifest.family}",
                "give the conversion of a language model",
            )
        self.shards = shards
        self.manifest = shards.manifest
        self.position = 0
        self.prompt: int | None = None  # tokens that were taken in before the first was generated
        self.figures = figures or Figures(shards.runtime)
        self.halted: Callable[[], bool] = lambda: False  # asked before each call of a prompt
        self._cuts = cuts_of(self.manifest)
        self._furthest = 0  # tokens that the caches have held at most
        self._states = States(shards.loaded)
        self._concurrency = concurrency
        dispatch = self._dispatch(concurrency)
        guessing = predictor if isinstance(predictor, Guessing) else Guessing(predictor)
        self._prefetch = self._ahead(guessing, dispatch)
        self._decode = self._lane("decode", dispatch, self._prefetch)
        self._prefill = self._decode
        self._one_way = any(port.root in ONE_WAY for port in self._decode.inputs)
        self._tail: Lane | None = None  # what follows a prompt's prefill, for its last token
        if self.manifest.prefill:
            self._prefill = self._lane("prefill", dispatch)
            if shards.tail:
                self._tail = Wiring(self._states).lane(shards.tail, TAIL, self._decode.slots)
        self._logits = np.zeros(self.manifest.vocab, np.float32)
        self._view = self._logits.view()
        self._view.flags.writeable = False
        self._prefill_clock = CallClock(self.figures.prefill)
        self._decode_clock = CallClock(self.figures.decode)

    @property
    def room(self) -> int:
        """Tokens that still fit into the context."""
        return self.manifest.context - self.position

    def reset(self) -> None:
        """Forget everything said so far; the figures stay."""
        self.position, self.prompt, self._furthest = 0, None, 0
        self._states.clear()

    def reusable(self, tokens: int) -> int:
        """How many of its first `tokens` tokens it can go on from as if it had taken in no others:
        fewer, or none, where the states of its mixers do not tell tokens apart."""
        if tokens >= self.position and not self._cuts.of_prompts:
            return self.position
        return self._cuts.place(min(tokens, self.position), self._furthest, self.prompt)

    def cut(self, tokens: int) -> int:
        """Forget all but the first `reusable(tokens)` tokens; returns how many that are."""
        kept = self.reusable(tokens)
        if kept == 0:
            self.reset()
        self.position, self.prompt = kept, None
        return kept

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Take in `ids` in chunks and return the last token's logits, fp32 `[V]`.

        Raises Halted between chunks where `halted` says so, and UserError when `ids` is empty, has
        ids outside the vocabulary, or does not fit into the context.
        """
        self._require(ids)
        rows = (self._rows(chunk) for chunk in _chunks(ids, self._prefill.tokens))
        return self._prefilled(rows, len(ids))

    def prefill_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """The same of embeddings, fp32 `[n,d]`, in place of the ids': what Hugging Face calls
        `inputs_embeds`, which a model may multiply.

        Raises UserError when there are none, when they do not fit into the context, or into fp16,
        or when the conversion does not say what they are multiplied by.
        """
        self._require_room(len(embeddings))
        scale = self.manifest.embed_scale
        if scale is None:
            raise UserError(
                "this conversion does not say what embeddings are multiplied by",
                "one of an earlier version",
                "convert again",
            )
        factor = np.float32(scale * self.manifest.stream_scale)
        with np.errstate(over="ignore"):
            rows = (np.asarray(embeddings, np.float32) * factor).astype(np.float16)
        if not np.isfinite(rows).all():
            raise UserError("the embeddings overflow fp16", f"times {factor:g}")
        tokens = self._prefill.tokens
        chunks = (rows[first : first + tokens] for first in range(0, len(rows), tokens))
        return self._prefilled(chunks, len(rows))

    def _prefilled(self, chunks: Iterable[np.ndarray], tokens: int) -> np.ndarray:
        started = perf_counter()
        clock, lane = self._prefill_clock, self._prefill
        for rows in chunks:
            if self.halted():
                raise Halted
            self._forward(lane, rows, clock)
        self._end_prompt()
        self._head_of(lane, len(rows) - 1, clock)
        return self._done(clock, tokens, started)

    def decode(self, identifier: int) -> np.ndarray:
        """Take in one token and return its logits, fp32 `[V]`. Raises UserError as `prefill`
        does."""
        self._require([identifier])
        started = perf_counter()
        clock = self._decode_clock
        self._forward(self._decode, self._rows([identifier]), clock)
        self._head_of(self._decode, 0, clock)
        return self._done(clock, 1, started)

    def prefill_logits(self, ids: Sequence[int], by: str = "prefill") -> np.ndarray:
        """Take in `ids` and return the logits of every token, a new fp32 array `[len(ids), V]`.

        by: "prefill" for the prefill functions, "decode" for one decode call per token. Raises as
        `prefill` does.
        """
        self._require(ids)
        logits = np.empty((len(ids), self.manifest.vocab), np.float32)
        if by == "decode":
            for index, identifier in enumerate(ids):
                logits[index] = self.decode(identifier)
            return logits
        started = perf_counter()
        clock = self._prefill_clock
        first = 0
        for chunk in _chunks(ids, self._prefill.tokens):
            self._forward(self._prefill, self._rows(chunk), clock)
            self._score(chunk, logits[first : first + len(chunk)], clock)
            first += len(chunk)
        self._end_prompt()
        self._done(clock, len(ids), started)
        return logits

    def _score(self, chunk: Sequence[int], logits: np.ndarray, clock: CallClock) -> None:
        """The logits `[n,V]` of all tokens of the last prefill call, in place."""
        count = len(chunk)
        if self._tail is None:
            for rows, scores in self._prefill.logits(clock):
                logits[:, rows] = scores[:, :count].T
            return
        for column in range(count):
            self._head_of(self._prefill, column, clock)
            logits[column] = self._logits

    def slot(self, slot: str) -> np.ndarray:
        """What the last prefill call put into a slot, for its real tokens: `[C,n]`, read only until
        the next call."""
        slots = self._prefill.slots
        return slots.columns(slot)[:, : slots.count]

    def _lane(
        self, name: str, dispatch: ExpertDispatch | None, prefetch: Prefetch | None = None
    ) -> BodyLane:
        slots, steps = Slots(self.shards.ropes), self.shards.body
        if name == "prefill":
            steps = self.shards.prefill
        notice = prefetch.layer_starts if prefetch else None
        rule = self._gate_rule(name)
        noticed = prefetch.reads if prefetch else STREAM
        wiring = Wiring(self._states, dispatch, notice, self._concurrency, rule, noticed)
        return BodyLane(wiring.lane(steps, name, slots), wiring.lane(self.shards.head, name, slots))

    def _gate_rule(self, name: str) -> GateRule | None:
        """What becomes of gates in the lane of this name."""
        return None

    def _dispatch(self, concurrency: int) -> ExpertDispatch | None:
        shards = self.shards
        if shards.cache is None:
            return None
        self.figures.cache = shards.cache.figures
        meetings = self.manifest.synchronisations
        if meetings and meetings.each_step:  # tracks run at once, and the experts of each do not
            concurrency = 1
        return ExpertDispatch(shards.experts, shards.cache, concurrency)

    def _ahead(self, guessing: Guessing, dispatch: ExpertDispatch | None) -> Prefetch | None:
        how = settled(guessing, self.manifest)
        predictor = make_predictor(how, self.shards.folder, self.manifest)
        if predictor is None:
            return None
        if dispatch is None:
            raise UserError(
                "there are no experts to load ahead",
                "no function or store holds any alone",
                "leave --predictor out",
            )
        self.figures.prefetch = self.figures.prefetch or PrefetchFigures(how.predictor)
        rule = None
        if how.only_if_it_pays:
            rule = AheadRule(dispatch.cache.figures, self._concurrency, how.contention)
        return Prefetch(predictor, dispatch, self.figures.prefetch, how.ahead or 1, rule)

    def _rows(self, ids: Sequence[int]) -> np.ndarray:
        """Embeddings of ids, fp16 `[n,d]`."""
        return self.shards.embed[np.asarray(ids)]

    def _forward(self, lane: BodyLane, rows: np.ndarray, clock: CallClock) -> None:
        """Run every layer on the embeddings `[n,d]` of at most T tokens, leaving the last hidden
        states in the lane's stream. What a failure leaves half done is written over by the same
        call, or forgotten with the rest where it cannot be taken back."""
        self._place(lane, rows, self.position)
        try:
            self._run(lane, clock)
        except BaseException:
            if self._one_way:
                self.reset()
            raise
        self.position += len(rows)

    def _place(self, lane: BodyLane, rows: np.ndarray, position: int) -> None:
        """Put embeddings `[n,d]` of tokens from `position` on into the lane's stream."""
        lane.slots.place(position, len(rows), prompt=self.prompt)
        stream = lane.slots.columns(STREAM)
        stream[:, : len(rows)] = rows.T
        stream[:, len(rows) :] = 0
        self._furthest = max(self._furthest, position + len(rows))

    def _run(self, lane: BodyLane, clock: CallClock) -> None:
        lane.body.run(clock)

    def _end_prompt(self) -> None:
        """What follows is generated, or answers to that."""
        self.prompt = self.position if self.prompt is None else self.prompt

    def _head_of(self, lane: BodyLane, column: int, clock: CallClock) -> None:
        """Logits of one column of a lane's stream, by what is left of the layers for it, and the
        decode functions of the head."""
        decode = self._decode
        if lane is not decode:
            decode.slots.columns(STREAM)[:, 0] = lane.slots.columns(STREAM)[:, column]
        if lane is not decode and self._tail is not None:
            own = self.position - lane.slots.count + column
            decode.slots.place(own, 1, prompt=self.prompt)
            self._tail.run(clock)
        for rows, scores in decode.logits(clock):
            self._logits[rows] = scores[:, 0]

    def _require(self, ids: Sequence[int]) -> None:
        self._require_room(len(ids))
        wrong = next(
            (identifier for identifier in ids if not 0 <= identifier < self.manifest.vocab), None
        )
        if wrong is not None:
            raise UserError(
                "a token id is outside the vocabulary",
                str(wrong),
                f"ids go from 0 to {self.manifest.vocab - 1}",
            )

    def _require_room(self, tokens: int) -> None:
        if tokens == 0:
            raise UserError(
                "there are no tokens to take in", "an empty prompt", "give at least one token"
            )
        if tokens > self.room:
            raise UserError(
                "the tokens do not fit into the context",
                f"{tokens} tokens at position {self.position} of {self.manifest.context}",
                "shorten the prompt, or convert with a larger --context",
            )

    def _done(self, clock: CallClock, tokens: int, started: float) -> np.ndarray:
        clock.phase.tokens += tokens
        clock.phase.seconds += perf_counter() - started
        return self._view


def _chunks(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[first : first + size] for first in range(0, len(ids), size)]
