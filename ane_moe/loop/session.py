"""Session: the token loop. Embeds, calls every shard in order, keeps the caches, returns logits.

T = tokens in a call, V = vocabulary, d = d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import Buffers, by_channel
from ane_moe.loop.experts import ExpertDispatch
from ane_moe.loop.figures import CallClock, Figures, PrefetchFigures
from ane_moe.loop.prefetch import Prefetch, make_predictor
from ane_moe.loop.shards import LoadedShard, LoadedShards
from ane_moe.runtime.interface import LoadedFunction


class _Cache:
    """One attention shard's KV cache: a Core ML state, or arrays passed in and out (`state = "explicit"`)."""

    def __init__(self, loaded: LoadedShard, explicit: bool) -> None:
        self._loaded = loaded
        self._explicit = explicit
        self._features: list[dict[str, np.ndarray]] = []
        self.state: Any = None
        self.clear()

    def bind(self, features: dict[str, np.ndarray]) -> None:
        """Keep the cache arrays in `features` up to date."""
        self._features.append(features)
        self.clear()

    def clear(self) -> None:
        if self._explicit:
            self._set({name: np.zeros(shape, np.float16) for name, shape in self._loaded.shard.states.items()})
        else:
            self.state = next(iter(self._loaded.functions.values())).make_state()

    def update(self, outputs: dict[str, np.ndarray]) -> None:
        if self._explicit:
            self._set({name: outputs[f"{name}_out"] for name in self._loaded.shard.states})

    def _set(self, arrays: dict[str, np.ndarray]) -> None:
        for features in self._features:
            features.update(arrays)


@dataclass(frozen=True)
class _Call:
    """One function with the inputs it always gets; the arrays behind them change, the dictionary does not."""

    kind: str
    function: LoadedFunction
    features: dict[str, np.ndarray]
    cache: _Cache | None = None

    def run(self, clock: CallClock) -> dict[str, np.ndarray]:
        started = clock.start()
        try:
            outputs = self.function.predict(self.features, self.cache.state if self.cache else None)
        finally:
            clock.stop(self.kind, started)
        if self.cache:
            self.cache.update(outputs)
        return outputs


@dataclass(frozen=True)
class _Layer:
    """The calls of one layer; without parts, its experts are dispatched."""

    index: int
    attn: _Call
    parts: tuple[_Call, ...]


@dataclass(frozen=True)
class _Lane:
    """Everything for calls of one width: buffers, the layers' calls, the head's with their rows."""

    buffers: Buffers
    layers: tuple[_Layer, ...]
    head: tuple[tuple[_Call, slice], ...]


class Session:
    """One conversation with the shards: its own caches and position over weights that sessions share.

    Logits are fp32 and, but for `prefill_logits`, one read-only array that the next call overwrites: copy to keep.
    """

    def __init__(self, shards: LoadedShards, *, concurrency: int = 1, predictor: str = "none") -> None:
        """For dispatched experts: `concurrency` of one layer run at once (the results do not depend on it), and
        `predictor` (a key of prefetch.PREDICTORS) chooses those loaded ahead."""
        self.shards = shards
        self.manifest = shards.manifest
        self.position = 0
        self.figures = Figures(shards.runtime)
        explicit = self.manifest.state == "explicit"
        self._caches = {layer.index: _Cache(layer.attn, explicit) for layer in shards.layers}
        self._decode = self._lane("decode", 1)
        self._prefill = self._lane("prefill", self.manifest.prefill) if self.manifest.prefill else self._decode
        self._dispatch, self._prefetch = self._expert_parts(concurrency, predictor)
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
        self.position = 0
        for cache in self._caches.values():
            cache.clear()

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Take in `ids` in chunks and return the last token's logits, fp32 `[V]`.

        Raises UserError when `ids` is empty, has ids outside the vocabulary, or does not fit into the context.
        """
        self._require(ids)
        started = perf_counter()
        clock = self._prefill_clock
        lane = self._prefill
        for chunk in _chunks(ids, lane.buffers.tokens):
            self._forward(lane, chunk, clock)
        self._head_of(lane, len(chunk) - 1, clock)
        return self._done(clock, len(ids), started)

    def decode(self, identifier: int) -> np.ndarray:
        """Take in one token and return its logits, fp32 `[V]`. Raises UserError as `prefill` does."""
        self._require([identifier])
        started = perf_counter()
        clock = self._decode_clock
        self._forward(self._decode, [identifier], clock)
        self._head_of(self._decode, 0, clock)
        return self._done(clock, 1, started)

    def prefill_logits(self, ids: Sequence[int], by: str = "prefill") -> np.ndarray:
        """Take in `ids` and return the logits of every token, a new fp32 array `[len(ids), V]`.

        by: "prefill" for the prefill functions, "decode" for one decode call per token. Raises as `prefill` does.
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
        for chunk in _chunks(ids, self._prefill.buffers.tokens):
            self._forward(self._prefill, chunk, clock)
            for call, rows in self._prefill.head:
                logits[first:first + len(chunk), rows] = by_channel(call.run(clock)["logits"])[:, :len(chunk)].T
            first += len(chunk)
        self._done(clock, len(ids), started)
        return logits

    def _lane(self, name: str, tokens: int) -> _Lane:
        layers = self.shards.layers
        buffers = Buffers(self.manifest, tokens, self.shards.embed, [layer.attn.shard.window for layer in layers],
                          self.shards.ropes)
        inputs = {"x": buffers.x}
        calls = tuple(_Layer(layer.index, self._attention(layer.index, layer.attn, name, buffers),
                             tuple(_Call(part.shard.kind, part.functions[name], inputs) for part in layer.ffn))
                      for layer in layers)
        head = tuple((_Call("lm_head", part.functions[name], inputs), slice(*(part.shard.rows or (0, None))))
                     for part in self.shards.head)
        return _Lane(buffers, calls, head)

    def _attention(self, layer: int, loaded: LoadedShard, name: str, buffers: Buffers) -> _Call:
        features = {"x": buffers.x, "mask": buffers.masks[loaded.shard.window], "write": buffers.write,
                    "keep": buffers.keep}
        if loaded.shard.rope is not None:
            features |= {"cos": buffers.cos[loaded.shard.rope], "sin": buffers.sin[loaded.shard.rope]}
        self._caches[layer].bind(features)
        return _Call(loaded.shard.kind, loaded.functions[name], features, self._caches[layer])

    def _expert_parts(self, concurrency: int, name: str) -> tuple[ExpertDispatch | None, Prefetch | None]:
        shards, predictor = self.shards, make_predictor(name, self.shards.folder, self.manifest)
        if shards.cache is None:
            return None, None
        self.figures.cache = shards.cache.figures
        dispatch = ExpertDispatch(self.manifest, shards.experts, shards.cache, concurrency)
        if predictor is None:
            return dispatch, None
        self.figures.prefetch = PrefetchFigures(name)
        return dispatch, Prefetch(predictor, dispatch, self.figures.prefetch)

    def _forward(self, lane: _Lane, ids: Sequence[int], clock: CallClock) -> None:
        """Run every layer on at most T tokens, leaving the last hidden states in the lane's x."""
        buffers = lane.buffers
        buffers.place(ids, self.position)
        for layer in lane.layers:
            outputs = layer.attn.run(clock)
            buffers.columns[:] = by_channel(outputs["y"])
            if len(layer.parts) == 1:
                buffers.columns[:] = by_channel(layer.parts[0].run(clock)["y"])
            elif layer.parts:
                buffers.total.fill(0)
                for part in layer.parts:
                    buffers.total += by_channel(part.run(clock)["y"])
                buffers.columns[:] = buffers.total
            elif layer.index in self.shards.experts:
                self._run_experts(lane, layer.index, outputs, len(ids), clock)
        self.position += len(ids)

    def _run_experts(self, lane: _Lane, layer: int, outputs: dict[str, np.ndarray], count: int,
                     clock: CallClock) -> None:
        """Add the chosen experts of `layer` to the first `count` columns of x, `[d,count]`."""
        assert self._dispatch
        ffn_input, gates = (by_channel(outputs[name])[:, :count] for name in ("ffn_input", "gates"))
        columns, total = lane.buffers.columns[:, :count], lane.buffers.total[:, :count]
        experts = self._dispatch.chosen(gates)
        if self._prefetch and lane is self._decode:
            self._prefetch.layer_starts(layer, experts, columns[:, 0])
        total[:] = columns
        self._dispatch.add(layer, experts, ffn_input, gates, total, clock)
        columns[:] = total

    def _head_of(self, lane: _Lane, column: int, clock: CallClock) -> None:
        """Logits of one column of a lane's x, by the decode functions of the head."""
        decode = self._decode
        if lane is not decode:
            decode.buffers.columns[:, 0] = lane.buffers.columns[:, column]
        for call, rows in decode.head:
            self._logits[rows] = by_channel(call.run(clock)["logits"])[:, 0]

    def _require(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise UserError("there are no tokens to take in", "an empty prompt", "give at least one token")
        wrong = next((identifier for identifier in ids if not 0 <= identifier < self.manifest.vocab), None)
        if wrong is not None:
            raise UserError("a token id is outside the vocabulary", str(wrong),
                            f"ids go from 0 to {self.manifest.vocab - 1}")
        if len(ids) > self.room:
            raise UserError("the tokens do not fit into the context",
                            f"{len(ids)} tokens at position {self.position} of {self.manifest.context}",
                            "shorten the prompt, or convert with a larger --context")

    def _done(self, clock: CallClock, tokens: int, started: float) -> np.ndarray:
        clock.phase.tokens += tokens
        clock.phase.seconds += perf_counter() - started
        return self._view


def _chunks(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[first:first + size] for first in range(0, len(ids), size)]
