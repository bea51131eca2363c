"""What a token costs, counted in calls, bytes and weights; seconds are the cost model's
business."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ane_moe.conversion.plan import ConversionPlan
from ane_moe.forecast.chips import Range
from ane_moe.forecast.pieces import ExpertSet, Piece, merge, pieces_of
from ane_moe.forecast.planned_facts import elementwise_in_a_row
from ane_moe.formats.recipe import find_format
from ane_moe.manifest import Manifest, read_manifest
from ane_moe.mlprogram.reader import read_program
from ane_moe.model.spec import MoeSpec
from ane_moe.placement.facts import function_facts

HEADS = ("lm_head", "labels")  # kinds


@dataclass(frozen=True)
class Calls:
    """Calls of one kind in a step of the model: `count` of them, each with `tokens` tokens, reading
    `stored_bytes` of `weights` elements at the chip's `rate`. `cache_bytes`: the KV states that one
    call goes over, whole, whatever part of them is in use (a static graph has no shorter way)."""

    kind: str
    count: Range
    stored_bytes: int
    weights: int
    rate: str
    tokens: int = 1
    cache_bytes: int = 0


@dataclass(frozen=True)
class Chain:
    """`steps` elementwise operations in a row, in each of so many functions that are compiled."""

    steps: int
    functions: int


@dataclass(frozen=True)
class Workload:
    """One step of decoding and one of prefill, and what all packages take. An encoder's step is a
    window of `step_tokens`, the most that it takes, both ways. `tail` is what a prompt's last token
    takes after the steps of prefill; packages of nothing else hold `tail_bytes`.

    `package_bytes` are the weights in packages, without the embedding, which the host reads;
    `functions` counts those that a runtime loads of one package with all its weights (each wires a
    copy of its own).
    """

    routing: str
    format: str
    decode: tuple[Calls, ...]
    prefill: tuple[Calls, ...]
    prefill_tokens: int
    packages: int
    package_bytes: int
    embed_bytes: int
    cache_bytes: int
    functions: int
    expert_bytes: int = 0
    step_tokens: int = 1
    chains: tuple[Chain, ...] = ()
    tail: tuple[Calls, ...] = ()
    tail_bytes: int = 0

    @property
    def tail_share(self) -> float:
        """What a long prompt saves since its last token alone goes through the `tail`: of the
        multiplications by weights of all layers."""
        layers = [call for call in self.decode if call.kind not in HEADS]
        whole, last = (
            sum(call.count.expected * call.weights for call in calls)
            for calls in (layers, self.tail)
        )
        return last / whole if whole else 0.0

    @property
    def disk_bytes(self) -> int:
        """Weights and embedding on disk."""
        return self.package_bytes + self.embed_bytes

    @property
    def calls_per_token(self) -> Range:
        """Core ML calls for one token of decoding."""
        return times(add(call.count for call in self.decode), 1 / self.step_tokens)

    @property
    def weight_bytes_per_token(self) -> Range:
        """Stored weight bytes read for one token of decoding."""
        read = add(times(call.count, call.stored_bytes) for call in self.decode)
        return times(read, 1 / self.step_tokens)


class ExpertTraffic(Protocol):
    """Counts of a routing trace, of one decoded token over all layers: routed expert functions
    called, and bytes of those that were not loaded yet."""

    @property
    def functions_per_token(self) -> float: ...

    @property
    def bytes_loaded_per_token(self) -> float: ...


def workload_of(conversion: Path | Manifest, adapter: str | None = None) -> Workload:
    """The workload of a finished conversion, with an adapter switched on; of a manifest alone,
    without the chains of its packages. Raises UserError for a broken folder."""
    manifest = read_manifest(conversion) if isinstance(conversion, Path) else conversion
    manifest = manifest.with_adapter(adapter)
    chains = _chains_in(conversion, manifest) if isinstance(conversion, Path) else ()
    table = find_format(manifest.embed_format).stored_bytes(manifest.vocab, manifest.d_model)
    embed = 0 if manifest.embed is None else table
    k = {
        int(layer): computing(facts["k"], facts["experts"], facts.get("idle", 0))
        for layer, facts in manifest.moe.items()
    }
    workload = assemble(
        pieces_of(manifest.shards, k),
        manifest.routing,
        manifest.weights,
        manifest.prefill,
        embed,
        manifest.lengths,
    )
    return replace(workload, chains=chains)


def workload_of_plan(plan: ConversionPlan, repeats: Mapping[int, int] | None = None) -> Workload:
    """The workload of a conversion that has not been made. A layer of the plan stands for as many
    as `repeats` says, or for itself."""
    options, layers = plan.options, enumerate(plan.spec.layers)
    k = {n: computing_of(layer.ffn) for n, layer in layers if isinstance(layer.ffn, MoeSpec)}
    pieces = pieces_of(plan.shards, k, repeats)
    workload = assemble(
        pieces,
        options.routing,
        options.recipe.name,
        0 if plan.lengths else options.prefill,
        plan.embed_bytes,
        plan.lengths,
    )
    return replace(workload, chains=_chains_of(plan, repeats or {}))


def computing(k: int, experts: int, idle: int) -> int:
    """How many of the `k` chosen compute something, were all experts chosen as often as the `idle`
    ones."""
    return max(1, round(k * experts / (experts + idle)))


def computing_of(moe: MoeSpec) -> int:
    """The same of a layer."""
    router = moe.router
    return computing(router.k, router.experts, getattr(router, "idle", 0))


def assemble(
    pieces: Iterable[Piece],
    routing: str,
    format: str,
    prefill: int,
    embed_bytes: int,
    lengths: tuple[int, ...] = (),
) -> Workload:
    """Count the calls that a model of these packages makes. `prefill` 0: prompts are decoded token
    by token. `lengths` are an encoder's."""
    merged, step = merge(pieces), max(lengths, default=1)
    called = [(part, count) for piece, count in merged for part in piece.parts or (piece,)]
    behind = [(piece, count) for piece, count in called if piece.tail and prefill]
    before = [one for one in called if one not in behind]
    alone = [(piece, count) for piece, count in merged if piece.tail and prefill]
    return Workload(
        routing=routing,
        format=format,
        decode=tuple(call for piece, count in merged for call in _calls(piece, count, step)),
        prefill=tuple(
            call for piece, count in before for call in _calls(piece, count, prefill or step)
        ),
        prefill_tokens=prefill or step,
        packages=sum(count * piece.packages for piece, count in merged),
        package_bytes=sum(count * piece.stored_bytes for piece, count in merged),
        embed_bytes=embed_bytes,
        cache_bytes=sum(count * piece.cache_bytes for piece, count in merged),
        functions=len(lengths) or (2 if prefill else 1),
        expert_bytes=sum(count * piece.stored_bytes for piece, count in merged if piece.experts),
        step_tokens=step,
        tail=tuple(call for piece, count in behind for call in _calls(piece, count, step)),
        tail_bytes=sum(count * piece.stored_bytes for piece, count in alone),
    )


def _calls(piece: Piece, count: int, tokens: int) -> list[Calls]:
    once = Range(count, count, count)
    if piece.experts is None:
        return [
            Calls(
                piece.kind,
                once,
                piece.stored_bytes,
                piece.weights,
                piece.rate,
                tokens,
                piece.cache_bytes + piece.borrowed_bytes,
            )
        ]
    chosen, share = piece.experts, piece.experts.shared_share
    groups, hit = math.ceil(chosen.experts / chosen.group), distinct_groups(chosen, tokens)
    each = (1 - share) / groups
    size = _padded(
        math.ceil(tokens * distinct_groups(chosen, 1).expected / hit.expected), chosen.tokens
    )
    stored, weights = round(piece.stored_bytes * each), round(piece.weights * each)
    calls = [Calls("experts", times(hit, count), stored, weights, piece.rate, size)]
    if share:
        stored, weights = round(piece.stored_bytes * share), round(piece.weights * share)
        calls.append(
            Calls("shared", once, stored, weights, piece.rate, _padded(tokens, chosen.tokens))
        )
    return calls


def distinct_groups(chosen: ExpertSet, tokens: int) -> Range:
    """Functions of one layer that `tokens` tokens call between them: at the least those of one
    token, as expected if every choice is as likely as any other, at the most all different ones."""
    groups = math.ceil(chosen.experts / chosen.group)
    others = chosen.experts - min(chosen.group, chosen.experts)
    missed = math.comb(others, chosen.k) / math.comb(chosen.experts, chosen.k)
    low = math.ceil(chosen.k / chosen.group)
    high = min(groups, chosen.k * tokens)
    return Range(low, min(max(groups * (1 - missed**tokens), low), high), high)


def add(ranges: Iterable[Range]) -> Range:
    """The sum, end by end."""
    listed = list(ranges)
    return Range(
        sum(r.low for r in listed), sum(r.expected for r in listed), sum(r.high for r in listed)
    )


def times(value: Range, factor: float) -> Range:
    return Range(value.low * factor, value.expected * factor, value.high * factor)


def _chains_of(plan: ConversionPlan, repeats: Mapping[int, int]) -> tuple[Chain, ...]:
    found = Counter[int]()
    for shard in plan.shards:
        copies = 1 if shard.layer is None else repeats.get(shard.layer, 1)
        for key in shard.graphs.values():
            found[elementwise_in_a_row(key)] += copies * len(key.functions)
    return tuple(itertools.starmap(Chain, sorted(found.items())))


def _chains_in(folder: Path, manifest: Manifest) -> tuple[Chain, ...]:
    """Counted in the packages: their programs are read, and no weights."""
    found = Counter[int]()
    for shard in manifest.packages:
        program = read_program(folder / shard.path)
        for function in shard.functions:
            found[function_facts(program, function.entry).facts["elementwise_in_a_row"]] += 1
    return tuple(itertools.starmap(Chain, sorted(found.items())))


def _padded(tokens: int, sizes: tuple[int, ...]) -> int:
    """The token count that is computed for `tokens`: the next one there is a function for."""
    return next((size for size in sizes if size >= tokens), sizes[-1])
