"""Every function of every shard on the golden's inputs, teacher-forced.

T = tokens in a call, N = tokens of the golden, d = d_model, E = experts, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ane_moe.loop.buffers import activation_shape, by_channel
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.shards import LoadedShard, check_shard, ffn_shards
from ane_moe.manifest import Manifest, Shard, ShardFunction
from ane_moe.original.golden import Golden
from ane_moe.runtime.interface import LoadedFunction
from ane_moe.verification.cached_attention import CachedAttention
from ane_moe.verification.expert_parity import ExpertParity
from ane_moe.verification.gate import NOT_FINITE, judge
from ane_moe.verification.result import RoutingResult, ShardResult
from ane_moe.verification.routing_parity import compare_routing, near_tie_flips

Routed = tuple[np.ndarray, np.ndarray, np.ndarray]      # gates, the golden's probabilities, its choices
Load = Callable[[Path, str], LoadedFunction]


@dataclass(frozen=True)
class Parity:
    """Runs the shards of `folder` on `golden` and yields a row per function.

    `load` opens one function of a package. Where prefill functions see every token, one-token calls (decode) see about
    `decode_tokens` of them (None: all): spread over the golden without a cache, the end of each prompt with one, after
    its beginning went through prefill.
    """

    folder: Path
    manifest: Manifest
    golden: Golden
    load: Load
    min_cosine: float
    decode_tokens: int | None
    experts: ExpertParity | None = None         # where the host dispatches them

    def embed(self) -> ShardResult:
        """The embedding table against the input of layer 0."""
        table = open_embeddings(self.folder, self.manifest)
        rows = table[np.concatenate(self.golden.prompts)]
        x = self.golden.layers[0].x
        return self._row(self.manifest.embed, "embed", None, "lookup", np.zeros_like(x), rows, x)

    def attention(self, layer: int) -> Iterator[ShardResult | RoutingResult]:
        """Rows of a layer's attention; where it also routes, those of the dispatched experts and the routing too."""
        golden = self.golden.layers[layer]
        x = _fp16(golden.x)
        for shard in self.manifest.shards_of("attn", layer):
            functions = {function.name: self._open(shard, function) for function in shard.functions}
            runner = CachedAttention(self.manifest, shard, functions)
            routings = []
            for function in shard.functions:
                rows, joined = self._cached(runner, function, x)
                yield self._row(shard.path, "attn", layer, function.name, x[rows], joined["y"],
                                golden.attn_delta[rows])
                if self.experts and "gates" in joined:
                    yield from self.experts.dispatched(layer, function.name, rows, joined)
                    assert golden.router_probs is not None and golden.router_indices is not None
                    routings.append((joined["gates"], golden.router_probs[rows], golden.router_indices[rows]))
            if routings:
                yield compare_routing(layer, *(np.concatenate(arrays) for arrays in zip(*routings, strict=True)))

    def stack(self, layer: int) -> Iterator[ShardResult | RoutingResult]:
        """Rows of the stack that begins with `layer`, judged by what all its layers add; then each layer's routing."""
        for shard in self.manifest.shards_of("stack", layer):
            goldens = [self.golden.layers[index] for index in shard.layers]
            x, delta = _fp16(goldens[0].x), goldens[-1].y - goldens[0].x
            functions = {function.name: self._open(shard, function) for function in shard.functions}
            runner = CachedAttention(self.manifest, shard, functions)
            routings: dict[int, list[Routed]] = {}
            for function in shard.functions:
                rows, joined = self._cached(runner, function, x)
                flipped = np.zeros(len(rows), bool)
                for place, golden in enumerate(goldens):
                    if golden.router_probs is not None and golden.router_indices is not None:
                        routed = (joined[f"gates_{place}"], golden.router_probs[rows], golden.router_indices[rows])
                        flipped |= near_tie_flips(*routed)
                        routings.setdefault(shard.layers[place], []).append(routed)
                yield self._row(shard.path, "stack", layer, function.name, x[rows], joined["y"], delta[rows], flipped)
            for index, routed_rows in routings.items():
                yield compare_routing(index, *(np.concatenate(arrays) for arrays in zip(*routed_rows, strict=True)))

    def _cached(self, runner: CachedAttention, function: ShardFunction,
                x: np.ndarray) -> tuple[list[int], dict[str, np.ndarray]]:
        """Golden rows the function saw, and its outputs on them, each prompt from an empty cache on."""
        rows: list[int] = []
        outputs = []
        for span, cut in zip(self.golden.spans, self._cuts(function), strict=True):
            runner.start()
            if cut > span.start:
                runner.run("prefill", x[span.start:cut])
            outputs.append(runner.run(function.name, x[cut:span.stop]))
            rows += range(cut, span.stop)
        return rows, {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

    def ffn(self, layer: int) -> Iterator[ShardResult | RoutingResult]:
        """Rows of a layer's MoE parts or its dense shard, then its routing; or of its expert functions."""
        if self.experts and layer in self.experts.dispatch.layers:
            yield from self.experts.functions(layer)
            return
        golden = self.golden.layers[layer]
        if self.manifest.is_stacked(layer):
            return
        shards = ffn_shards(self.manifest, layer)
        routings = []
        for function in shards[0].functions:
            tokens = self._tokens(function)
            x = _fp16(golden.middle[tokens])
            outputs = [self._stateless(self._open(shard, function), function.tokens, x) for shard in shards]
            y = np.sum([output["y"].astype(np.float32) for output in outputs], axis=0)
            flipped = np.zeros(len(tokens), bool)
            if golden.router_probs is not None and golden.router_indices is not None:
                routed = (outputs[0]["gates"], golden.router_probs[tokens], golden.router_indices[tokens])
                flipped = near_tie_flips(*routed)
                routings.append(routed)
            for shard, output in zip(shards, outputs, strict=True):
                row = self._row(shard.path, shard.kind, layer, function.name, x, y, golden.ffn_delta[tokens], flipped)
                yield row if np.isfinite(output["y"]).all() else _not_finite(row)
        if routings:
            yield compare_routing(layer, *(np.concatenate(arrays) for arrays in zip(*routings, strict=True)))

    def head(self) -> Iterator[ShardResult]:
        """Each vocabulary slice on the last captured layer's output."""
        last = self.golden.layers[max(self.golden.layers)]
        for shard in self.manifest.shards_of("lm_head"):
            for function in shard.functions:
                tokens = self._tokens(function)
                output = self._stateless(self._open(shard, function), function.tokens, _fp16(last.y[tokens]))
                logits = self.golden.logits[tokens, slice(*(shard.rows or (0, None)))]
                yield self._row(shard.path, "lm_head", None, function.name, np.zeros_like(logits), output["logits"],
                                logits)

    def _open(self, shard: Shard, function: ShardFunction) -> LoadedFunction:
        loaded = self.load(self.folder / shard.path, function.name)
        check_shard(LoadedShard(replace(shard, functions=(function,)), {function.name: loaded}), self.manifest,
                    self.folder)
        return loaded

    def _tokens(self, function: ShardFunction) -> np.ndarray:
        """Golden rows a function without a cache sees."""
        count = sum(map(len, self.golden.prompts))
        if function.name == "prefill" or not self.manifest.prefill or self.decode_tokens is None:
            return np.arange(count)
        return np.unique(np.linspace(0, count - 1, min(count, self.decode_tokens)).round().astype(int))

    def _cuts(self, function: ShardFunction) -> list[int]:
        """Golden row of each prompt at which an attention function takes over from prefill."""
        if function.name == "prefill":
            return [span.start for span in self.golden.spans]
        tail = decode_tail(self.manifest, self.golden, self.decode_tokens)
        return [span.start if tail is None else max(span.start, span.stop - tail) for span in self.golden.spans]

    def _stateless(self, function: LoadedFunction, tokens: int, x: np.ndarray) -> dict[str, np.ndarray]:
        """Run `x` fp16 `[N,d]` in chunks of T, the last one padded; outputs as `[N,C]`."""
        buffer = np.zeros(activation_shape(self.manifest, x.shape[1], tokens), np.float16)
        collected: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(x), tokens):
            chunk = x[first:first + tokens]
            by_channel(buffer)[:] = 0
            by_channel(buffer)[:, :len(chunk)] = chunk.T
            for name, value in function.predict({"x": buffer}, None).items():
                collected.setdefault(name, []).append(by_channel(value)[:, :len(chunk)].T.copy())
        return {name: np.concatenate(values) for name, values in collected.items()}

    def _row(self, path: str, kind: str, layer: int | None, function: str, base: np.ndarray, y: np.ndarray,
             delta: np.ndarray, left_out: np.ndarray | None = None) -> ShardResult:
        return judge(path, kind, layer, function, base, y, delta, self.min_cosine, left_out)


def decode_tail(manifest: Manifest, golden: Golden, decode_tokens: int | None) -> int | None:
    """How many tokens at the end of each prompt go through decode; None for all of them."""
    if not manifest.prefill or decode_tokens is None:
        return None
    return max(1, decode_tokens // len(golden.prompts))


def _not_finite(row: ShardResult) -> ShardResult:
    """A part whose own output is not finite, though the sum of the parts may be."""
    return replace(row, passed=False, reason=NOT_FINITE)


def _fp16(x: np.ndarray) -> np.ndarray:
    """What the session would hand the shard; values beyond fp16 become Inf and fail by name, not silently."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)
