"""Every function of every shard on the golden's inputs, teacher-forced.

N = tokens of the golden, C = channels of a slot, E = experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ane_moe.loop.buffers import Ropes
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.experts import ExpertLayer
from ane_moe.loop.labels import context_each_side
from ane_moe.loop.shards import LoadedShard
from ane_moe.loop.windows import Window, windows_of
from ane_moe.manifest import TAIL, Manifest, Shard, ShardFunction
from ane_moe.model.port import GATES, GUESS, STREAM, slot_arguments, slot_root
from ane_moe.original.golden import Golden, embedded
from ane_moe.verification.expert_parity import ExpertParity
from ane_moe.verification.gate import NOT_FINITE, judge
from ane_moe.verification.golden_slots import GoldenSlots, HostGuesses, host_guesses
from ane_moe.verification.result import RoutingResult, ShardResult
from ane_moe.verification.routing_parity import compare_routing, near_tie_flips
from ane_moe.verification.stage import Outcome, StageRun, Values

# Gates, and the golden's probabilities, choices, and what they were made by.
Routed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Parity:
    """Runs the shards of `folder` on `golden` and yields a row per function.

    An encoder's functions see each prompt in windows (windows.py), and count where all that a token
    depends on is inside.

    Where prefill functions see every token, one-token calls (decode) see about
    `decode_tokens` of them (None: all): spread over the golden where nothing is kept from call to
    call, else the end of each prompt, after its beginning went through prefill.
    """

    folder: Path
    manifest: Manifest
    golden: Golden
    min_cosine: float
    decode_tokens: int | None
    ropes: Ropes
    opened: Callable[[Shard], LoadedShard]
    experts: ExpertParity | None = None  # where the host dispatches them
    # What the shards that others read keep after each prompt, by slot.
    lent: list[dict[str, np.ndarray]] = field(default_factory=list)

    @cached_property
    def _slots(self) -> GoldenSlots:
        return GoldenSlots(self.golden, lambda: self._guesses)

    @cached_property
    def _guesses(self) -> HostGuesses | None:
        return host_guesses(self.folder, self.manifest)

    def embed(self) -> Iterator[ShardResult]:
        """The embedding table, where there is one, against the input of layer 0."""
        if self.manifest.embed is None:
            return
        table, x = open_embeddings(self.folder, self.manifest), embedded(self.golden)
        rows, nothing = table[np.concatenate(self.golden.prompts)], np.zeros_like(x)
        yield judge(self.manifest.embed, "embed", None, "lookup", nothing, rows, x, self.min_cosine)

    def rows(
        self, own: Sequence[LoadedShard] | ExpertLayer
    ) -> Iterator[ShardResult | RoutingResult]:
        """Rows of what can be told apart in a stage."""
        if not isinstance(own, ExpertLayer):
            yield from self.stage(own)
        elif self.experts:
            yield from self.experts.functions(own.layer)

    def stage(self, loaded: Sequence[LoadedShard]) -> Iterator[ShardResult | RoutingResult]:
        """Rows of shards that work together: each function by the slots it writes, then the routing
        of their layers, and what the dispatched experts add where the shards choose them."""
        run, shards = StageRun(loaded, self.ropes), tuple(one.shard for one in loaded)
        routings: dict[int, list[Routed]] = {}
        for function in shards[0].functions:
            seen = self._outcome(run, shards[0], function)
            if seen is None:
                continue
            rows, given, outcome = seen
            routed = self._routed(outcome.values, rows)
            yield from self._judged(shards, function, rows, given, outcome, routed)
            for layer, routing in routed.items():
                routings.setdefault(layer, []).append(routing)
                if self.experts and layer in self.experts.dispatch.layers:
                    slot = self.experts.dispatch.layers[layer].source
                    ffn_input, flipped = outcome.values[slot], near_tie_flips(*routing)
                    yield from self.experts.dispatched(
                        layer, function.name, rows, ffn_input, routing[0], flipped
                    )
        for layer, parts in routings.items():
            yield compare_routing(
                layer, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            )

    def _judged(
        self,
        shards: tuple[Shard, ...],
        function: ShardFunction,
        rows: np.ndarray,
        given: Values,
        outcome: Outcome,
        routed: Mapping[int, Routed],
    ) -> Iterator[ShardResult]:
        """A row for each shard and each slot it writes, if the golden knows the slot."""
        flipped = np.zeros(len(rows), bool)
        if any(shard.experts for shard in shards):  # what they add depends on who was chosen
            for routing in routed.values():
                flipped |= near_tie_flips(*routing)
        stream = next((v for slot, v in given.items() if slot_root(slot) == STREAM), None)
        for shard, finite in zip(shards, outcome.finite, strict=True):
            for slot, value in outcome.values.items():
                expected = self._slots.expected(shard.run_of(function), slot, stream)
                if expected is None:
                    continue
                base, added = (part[rows] for part in expected)
                beside = {"carry": f" {slot}", GUESS: f" {GUESS}"}.get(slot_root(slot), "")
                name = f"{function.name}{beside}"
                row = judge(
                    shard.path,
                    shard.kind,
                    shard.layer,
                    name,
                    base,
                    value,
                    added,
                    self.min_cosine,
                    flipped,
                )
                yield row if finite else replace(row, passed=False, reason=NOT_FINITE)

    def _outcome(
        self, run: StageRun, shard: Shard, function: ShardFunction
    ) -> tuple[np.ndarray, Values, Outcome] | None:
        """The golden's rows that a function saw, what it is given for each of the golden's, and
        what it wrote; None where no prompt fits it."""
        slots = self._slots
        values = {slot: _fp16(slots.before(shard.run_of(function), slot)) for slot in run.reads}
        if self.manifest.lengths:
            return self._windows(run, shard, function, values)
        if not (shard.states or shard.borrowed):
            rows = self._tokens(function)
            given = {slot: value[rows] for slot, value in values.items()}
            return rows, values, run.run(function.name, given)
        pieces, outcomes = [], []
        entering = {slot: _fp16(slots.before(shard, slot)) for slot in run.reads}
        lent = self._lent() if shard.borrowed else [{} for _ in self.golden.spans]
        for span, cut, own in zip(self.golden.spans, self._cuts(function), lent, strict=True):
            run.start(own, 0 if shard.states else cut - span.start)
            # A tail reads what its token has left in the caches, too.
            taken = span.stop if function.name == TAIL else cut
            if taken > span.start and shard.states:
                before = {slot: value[span.start : taken] for slot, value in entering.items()}
                run.run("prefill", before)
                run.go_to(cut - span.start)
            outcomes.append(
                run.run(
                    function.name, {slot: value[cut : span.stop] for slot, value in values.items()}
                )
            )
            pieces.append(np.arange(cut, span.stop))
        return np.concatenate(pieces), values, _joined(outcomes)

    def _lent(self) -> list[dict[str, np.ndarray]]:
        """What is read of other shards, by prompt: what these keep of the golden's own inputs."""
        if self.lent:
            return self.lent
        slots, lent = self._slots, self.manifest.lent
        self.lent.extend({} for _ in self.golden.spans)
        for shard in {shard.path: shard for shard in lent.values()}.values():
            run, widest = StageRun([self.opened(shard)], self.ropes), shard.functions[-1].name
            values = {slot: _fp16(slots.before(shard, slot)) for slot in run.reads}
            for span, held in zip(self.golden.spans, self.lent, strict=True):
                run.start()
                run.run(widest, {slot: value[span] for slot, value in values.items()})
                held |= run.kept(lent)
        return self.lent

    def _windows(
        self, run: StageRun, shard: Shard, function: ShardFunction, values: Values
    ) -> tuple[np.ndarray, Values, Outcome] | None:
        pieces, outcomes = [], []
        reach = context_each_side([shard])
        for window in windows_of(self.golden.spans, function.tokens, reach):
            run.start()
            given = {slot: value[window.first : window.last] for slot, value in values.items()}
            outcomes.append(_kept(run.run(function.name, given), window))
            pieces.append(np.arange(window.kept_first, window.kept_last))
        if not pieces:
            return None
        return np.concatenate(pieces), values, _joined(outcomes)

    def _routed(self, values: Values, rows: np.ndarray) -> dict[int, Routed]:
        """Gates by layer, with what the golden says of the same tokens."""
        routed = {}
        for slot, gates in values.items():
            if slot_root(slot) == GATES:
                layer = int(slot_arguments(slot)[0])
                golden = self.golden.layers[layer]
                assert golden.router_probs is not None and golden.router_indices is not None
                scores = (
                    golden.router_probs if golden.router_scores is None else golden.router_scores
                )
                routed[layer] = (
                    gates,
                    golden.router_probs[rows],
                    golden.router_indices[rows],
                    scores[rows],
                )
        return routed

    def _tokens(self, function: ShardFunction) -> np.ndarray:
        """Golden rows a function that keeps nothing sees."""
        count = sum(map(len, self.golden.prompts))
        if function.name == "prefill" or not self.manifest.prefill or self.decode_tokens is None:
            return np.arange(count)
        return np.unique(
            np.linspace(0, count - 1, min(count, self.decode_tokens)).round().astype(int)
        )

    def _cuts(self, function: ShardFunction) -> list[int]:
        """Golden row of each prompt at which a function takes over from prefill."""
        if function.name == "prefill":
            return [span.start for span in self.golden.spans]
        tail = decode_tail(self.manifest, self.golden, self.decode_tokens)
        return [
            span.start if tail is None else max(span.start, span.stop - tail)
            for span in self.golden.spans
        ]


def decode_tail(manifest: Manifest, golden: Golden, decode_tokens: int | None) -> int | None:
    """How many tokens at the end of each prompt go through decode; None for all of them."""
    if not manifest.prefill or decode_tokens is None:
        return None
    return max(1, decode_tokens // len(golden.prompts))


def _kept(outcome: Outcome, window: Window) -> Outcome:
    kept = slice(window.kept_first - window.first, window.kept_last - window.first)
    return Outcome({slot: value[kept] for slot, value in outcome.values.items()}, outcome.finite)


def _joined(outcomes: list[Outcome]) -> Outcome:
    """The outcomes of one function on several prompts, end to end."""
    values = {
        slot: np.concatenate([outcome.values[slot] for outcome in outcomes])
        for slot in outcomes[0].values
    }
    finite = np.all([outcome.finite for outcome in outcomes], axis=0)
    return Outcome(values, tuple(finite.tolist()))


def _fp16(x: np.ndarray) -> np.ndarray:
    """What the session would hand the shard; values beyond fp16 become Inf and fail by name, not
    silently."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)
