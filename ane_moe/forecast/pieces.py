"""What a model's packages hold, as far as time and memory depend on it: the same facts from a
finished conversion as from a plan."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ane_moe.manifest import EXPERT_GRAPH, TAIL, Shard


@dataclass(frozen=True)
class ExpertSet:
    """A layer's experts as functions that the host calls: `k` of `experts`, `group` of them in a
    function, which exists for each token count in `tokens`. `shared_share` of the bytes is an
    expert that is always called."""

    experts: int
    k: int
    group: int
    tokens: tuple[int, ...]
    shared_share: float = 0.0

    @property
    def functions(self) -> int:
        """Functions for one token count."""
        return math.ceil(self.experts / self.group) + (1 if self.shared_share else 0)


@dataclass(frozen=True)
class Piece:
    """One package, or the `packages` of one layer's expert functions: `stored_bytes` of `weights`
    elements, worked off at the chip's `rate` for them. The KV states take `cache_bytes`, the whole
    width; those that it reads and others keep, `borrowed_bytes`, as often as layers read them. Of a
    `tail` a prompt's last token alone is in need. `parts` of it are what all tokens of a prompt go
    through, and what the last one does."""

    kind: str
    stored_bytes: int
    weights: int
    rate: str
    cache_bytes: int = 0
    packages: int = 1
    experts: ExpertSet | None = None
    borrowed_bytes: int = 0
    tail: bool = False
    parts: "tuple[Piece, ...]" = ()


def pieces_of(
    shards: Iterable[Shard], k: Mapping[int, int], repeats: Mapping[int, int] | None = None
) -> list[Piece]:
    """The packages of a conversion, finished or planned; `k` experts of each layer are chosen for a
    token. A layer stands for as many as `repeats` says, or for itself."""
    times: Counter[int | None] = Counter(repeats or {})
    pieces: list[Piece] = []
    by_layer: dict[int, list[Shard]] = defaultdict(list)
    for shard in shards:
        if shard.kind == EXPERT_GRAPH:
            continue  # it is called as the experts that it computes
        if shard.kind == "experts":
            assert shard.layer is not None
            by_layer[shard.layer].append(shard)
        else:
            pieces += [_piece(shard)] * (times[shard.layer] or 1)
    for layer, packages in by_layer.items():
        pieces += [_expert_piece(packages, k[layer])] * (times[layer] or 1)
    return pieces


def _piece(shard: Shard) -> Piece:
    call, caches = shard.functions[0], _fp16_bytes(shard.states)
    piece = Piece(
        shard.kind,
        shard.weight_bytes,
        call.elements,
        call.rate,
        caches,
        borrowed_bytes=_fp16_bytes(shard.borrowed),
        tail=shard.is_tail,
    )
    parts = [
        Piece(
            shard.kind,
            own.weight_bytes,
            own.elements,
            own.rate,
            0 if own.name == TAIL else caches,
            borrowed_bytes=caches * len(own.layers) if own.name == TAIL else 0,
            tail=own.name == TAIL,
        )
        for own in shard.functions
        if own.layers
    ]
    read = sum(part.borrowed_bytes for part in parts)
    return replace(piece, parts=tuple(parts), borrowed_bytes=read) if parts else piece


def _fp16_bytes(caches: Mapping[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in caches.values())


def merge(pieces: Iterable[Piece]) -> list[tuple[Piece, int]]:
    """Equal pieces once each, with their number."""
    return list(Counter(pieces).items())


def _expert_piece(packages: list[Shard], k: int) -> Piece:
    """A layer's expert functions, those of one group differing in their token counts alone."""
    groups = [functions[0] for shard in packages for functions in shard.copies.values()]
    routed = [group for group in groups if group.experts]
    experts = sum(len(group.experts) for group in routed)
    elements = sum(group.elements for group in groups)
    shared = elements - sum(group.elements for group in routed)
    tokens = tuple(sorted({function.tokens for shard in packages for function in shard.functions}))
    chosen = ExpertSet(experts, k, math.ceil(experts / len(routed)), tokens, shared / elements)
    stored = sum(shard.weight_bytes for shard in packages)
    count = sum(shard.store is None for shard in packages)
    return Piece("experts", stored, elements, routed[0].rate, packages=count, experts=chosen)
