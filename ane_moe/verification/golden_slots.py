"""What a golden says of the slots around a shard. N = tokens, C = channels of a slot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ane_moe.loop.prefetch import Guessing, RouterAhead, guesses_of, make_predictor
from ane_moe.manifest import Manifest, Shard
from ane_moe.model.port import ADDED, FFN_INPUT, GUESS, LATER, STREAM, slot_arguments, slot_root
from ane_moe.original.golden import Golden, LayerGolden


@dataclass(frozen=True)
class HostGuesses:
    """Experts as a host guesses them that has adapters and routers: what shards are to give.
    `layers`: the one that each layer guesses."""

    router: RouterAhead
    layers: Mapping[int, int]

    def of(self, shard: Shard, hidden: np.ndarray) -> np.ndarray:
        """Scores fp32 `[N,C]` for hidden states `[N,d]` as the shard's experts add to them."""
        assert shard.layer is not None
        return self.router.scores(self.layers[shard.layer], hidden)


def host_guesses(folder: Path, manifest: Manifest) -> HostGuesses | None:
    """None where shards guess nothing. Raises UserError where the conversion lacks what it needs to
    compare them with."""
    layers = guesses_of(manifest)
    if not layers:
        return None
    router = make_predictor(Guessing("adapter"), folder, manifest)
    assert isinstance(router, RouterAhead)
    return HostGuesses(router, layers)


@dataclass(frozen=True)
class GoldenSlots:
    """Values of slots before and after the call of a shard. `guesses` are asked for by shards that
    guess experts, and by no others."""

    golden: Golden
    guesses: Callable[[], HostGuesses | None]

    def before(self, shard: Shard, slot: str) -> np.ndarray:
        """What the shard is given, fp32 `[N,C]`."""
        if slot == ADDED:
            first = self._first(shard)
            added = first.experts_delta if first.ffn_reads is None else first.attn_delta
            assert added is not None
            return added
        if slot_root(slot) != STREAM:
            (name,) = slot_arguments(slot)
            return self._first(shard).carried_in[name]
        if shard.layer is None:
            return self.golden.last
        first = self._first(shard)
        if shard.scope == "ffn":
            return first.read_by_ffn
        return first.x if first.entering is None else first.entering

    def expected(
        self, shard: Shard, slot: str, given: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What the slot holds afterwards, `[N,C]`, as what is there without the shard and the
        shard's own contribution; None for slots that it does not write, or that say nothing by
        themselves. `given` is the stream that the shard was handed, if any. What tracks give is
        their own, as if none met.
        """
        if slot not in _written(shard):
            return None
        root = slot_root(slot)
        if root == STREAM:
            return self._stream(shard, given)
        if slot == ADDED and shard.scope == "attn" and not _leaves_experts_to_the_host(shard):
            added = self._first(shard).attn_delta
            return np.zeros_like(added), added
        if slot == ADDED and shard.scope == "ffn" and self._first(shard).ffn_reads is None:
            experts = self._first(shard).experts_delta
            return None if experts is None else (np.zeros_like(experts), experts)
        if root == "logits":
            logits = self.golden.logits[:, slice(*(shard.rows or (0, None)))]
            return np.zeros_like(logits), logits
        if root == GUESS and (guesses := self.guesses()):
            kept, added = self._stream(shard, None)
            scores, at_rest = (
                guesses.of(shard, one) for one in (kept + added, np.zeros_like(kept))
            )
            return at_rest, scores - at_rest
        if root == "carry":
            (name,) = slot_arguments(slot)
            after = self._last(shard).carried_out[name]
            experts = self._last(shard).experts_delta
            if slot == LATER and experts is not None and _leaves_experts_to_the_host(shard):
                after = after - experts
            return np.zeros_like(after), after
        return None

    def _stream(self, shard: Shard, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Where a residual shifts and scales the stream, that is no contribution of the shard's."""
        first = self._first(shard)
        before = self.before(shard, STREAM)
        if shard.scope == "ffn" and first.ffn_reads is not None:
            return (before if given is None else given) + first.attn_delta, first.ffn_delta
        if shard.scope == "ffn":
            delta, residuals = first.ffn_delta, [first.ffn_stream]
        elif shard.scope:
            delta, residuals = first.attn_delta, [first.attn_stream]
            if first.entering is not None:  # the stream is what has been made of that
                before = given = first.x
            to_host = _leaves_experts_to_the_host(shard) and ADDED not in _written(shard)
            if to_host and first.ffn_stream is not None:
                assert first.experts_delta is not None
                delta = first.y - first.experts_delta - before
                residuals.append(first.ffn_stream)
        else:
            delta, residuals = self._after(shard) - before, []
        kept, base = before, before if given is None else given
        for residual in residuals:
            if residual is not None:
                bias, scale = residual
                kept, base = (kept + bias) * scale, (base + bias) * scale
        return base, delta if kept is before else before + delta - kept

    def _after(self, shard: Shard) -> np.ndarray:
        """The stream after whole layers; of tracks that meet inside the shard, after that."""
        depth = len(shard.place(()).layers) // shard.tracks
        ends = shard.place(()).layers[depth - 1 :: depth]
        total = np.sum([self.golden.layers[number].y for number in ends], axis=0)
        return total / shard.tracks if shard.reduce == "mean" else total

    def _first(self, shard: Shard) -> LayerGolden:
        return self.golden.layers[shard.place(()).layers[0]]

    def _last(self, shard: Shard) -> LayerGolden:
        return self.golden.layers[shard.place(()).layers[-1]]


def _leaves_experts_to_the_host(shard: Shard) -> bool:
    return FFN_INPUT in map(slot_root, _written(shard))


def _written(shard: Shard) -> set[str]:
    """The slots that a shard's functions write."""
    return {port.slot for function in shard.functions for port in function.ports.outputs}
