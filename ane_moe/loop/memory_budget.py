"""What of a conversion with stores of experts stays in memory, and what that leaves for experts.

The interpreter and its libraries come on top: some 350 MB with torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from ane_moe.errors import UserError
from ane_moe.loop.expert_store import READERS
from ane_moe.manifest import Shard
from ane_moe.model.port import LOGITS

MB = 1_000_000
FREE_SHARE = 0.5  # of the memory that is free: what all takes where nobody says
EXPANDED_SHARE = 0.25  # of what is left: the most that expanded copies of packages' weights take
CALL_BYTES = 1 << 22  # what a call of an expert takes beside its weights: blocks as fp32


@dataclass(frozen=True)
class Budget:
    """Bytes that stay: `packages` as stored, which are mapped; the embedding `table`; `caches` of a
    session; `reading`: buffers of records, and what calls of experts take; `expanded` copies of
    packages' weights; and `experts`: of what is left as much as there is use for. `fitting` of the
    `total` experts stay at once."""

    packages: int
    table: int
    caches: int
    reading: int
    expanded: int
    experts: int
    fitting: int
    total: int

    @property
    def all(self) -> int:
        """Of it together."""
        parts = (self.packages, self.table, self.caches, self.reading, self.expanded, self.experts)
        return sum(parts)

    def as_json(self) -> dict[str, Any]:
        """Plain data, units in the names."""
        counts = {"fitting": self.fitting, "total": self.total}
        sizes = {name: size for name, size in asdict(self).items() if name not in counts}
        return {f"{name}_bytes": size for name, size in sizes.items()} | counts


def budget_of(shards: Sequence[Shard], table: int, limit_bytes: int | None = None) -> Budget:
    """How `limit_bytes` (None: half of what is free) are divided over the shards of a conversion,
    finished or planned, and `table` bytes of embeddings.
    Raises UserError when they leave no room for one expert."""
    stores = [(shard.store.record, shard.store.count) for shard in shards if shard.store]
    sizes = [record.expanded.size for record, _ in stores]
    apart = [record.size for record, _ in stores if not record.is_plain]
    others = [shard for shard in shards if shard.store is None]
    packages = sum(shard.weight_bytes for shard in others)
    caches = sum(2 * math.prod(shape) for shape in _kept(others))
    reading = READERS * (max(apart, default=0) + CALL_BYTES)
    if limit_bytes is None:
        limit_bytes = int(psutil.virtual_memory().available * FREE_SHARE)
    left = limit_bytes - packages - table - caches - reading
    if left < max(sizes):
        least = math.ceil((limit_bytes - left + max(sizes)) / MB)
        raise UserError(
            "the memory holds no expert beside what always stays",
            f"{limit_bytes / MB:,.0f} MB; packages, embeddings, caches and buffers take "
            f"{(limit_bytes - left) / MB:,.0f}, an expert {max(sizes) / MB:,.1f}",
            f"give --memory-mb {least} or more",
        )
    expanded = min(int((left - max(sizes)) * EXPANDED_SHARE), _expandable(others))
    total = sum(count for _, count in stores)
    whole = sum(size * count for size, (_, count) in zip(sizes, stores, strict=True))
    experts = min(left - expanded, whole)
    fitting = experts * total // whole
    return Budget(packages, table, caches, reading, expanded, experts, fitting, total)


def _kept(shards: Iterable[Shard]) -> Iterator[tuple[int, ...]]:
    """The shapes of what a session keeps, and of its scores."""
    for shard in shards:
        yield from shard.states.values()
        outputs = shard.functions[0].ports.outputs
        yield from (port.shape for port in outputs if port.root == LOGITS)


def _expandable(shards: Iterable[Shard]) -> int:
    """What expanded copies of all weights in packages would take."""
    return sum(2 * _elements(shard) for shard in shards)


def _elements(shard: Shard) -> int:
    firsts = (functions[0] for functions in shard.copies.values())
    return sum(function.elements for function in firsts if function.rate != "fp16")
