"""A conversion opened to be talked with."""

from dataclasses import dataclass
from pathlib import Path

from ane_moe.loop.eviction import DEFAULT_POLICY
from ane_moe.loop.shards import LoadedShards, load_shards
from ane_moe.loop.tokenizer import Tokenizer, load_tokenizer

MB = 1_000_000


@dataclass(frozen=True)
class OpenModel:
    """The shards, loaded, and the tokenizer, where the checkpoint had one."""

    shards: LoadedShards
    tokenizer: Tokenizer | None


def open_model(
    folder: Path,
    runtime: str = "auto",
    precision: str = "fp32",
    *,
    expert_cache_mb: float | None = None,
    expert_policy: str = DEFAULT_POLICY,
    memory_mb: float | None = None,
    adapter: str | None = None,
    direct: bool = False,
) -> OpenModel:
    """Load the conversion in `folder`, as `load_shards` and `load_tokenizer`. Raises UserError."""
    limit = None if expert_cache_mb is None else int(expert_cache_mb * MB)
    shards = load_shards(
        folder,
        runtime,
        precision=precision,
        expert_cache_bytes=limit,
        expert_policy=expert_policy,
        memory_mb=memory_mb,
        adapter=adapter,
        direct=direct,
    )
    return OpenModel(shards, load_tokenizer(folder, shards.manifest))
