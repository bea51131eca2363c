"""The goldens beside a conversion's shards: captured, or kept from an earlier run."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.job import Job
from ane_moe.conversion.plan import GOLDEN_FILES
from ane_moe.emit.coreml.package import ContentKey
from ane_moe.errors import UserError
from ane_moe.files import scratch_folder, sha256
from ane_moe.manifest import FILE_NAME, Manifest, read_manifest
from ane_moe.model.weight import EMBEDDING
from ane_moe.opened import with_adapter

GOLDEN = "golden.safetensors"
GOLDEN_AS_STORED = "golden_as_stored.safetensors"


def golden_key(job: Job, content_keys: Iterable[str]) -> str:
    """What goldens depend on besides prompts, as sha256 (hex).

    `content_keys` are of the shards and the embedding table, and so of the tensors they hold.
    Other tensors that a golden is made of are read here.
    """
    plan = job.plan
    facts = (job.checkpoint.config, plan.layers, plan.context, plan.options.routing)
    key = ContentKey(facts, sorted(content_keys))
    weights = [source for shard in plan.shards for source in shard.sources.values()]
    table = {EMBEDDING} if plan.options.inputs == "ids" else set()
    held = {*table, *(source.name for source in weights if isinstance(source, TensorSource))}
    for name, source in job.sources.items():
        after = name.layer is not None and name.layer > max(plan.layers)
        if name not in held and not after:
            job.checkpoint.feed(source, key)
    return key.digest()


def finished(out: Path) -> Manifest | None:
    """The manifest of an earlier run that was finished in `out`."""
    try:
        return read_manifest(out) if (out / FILE_NAME).is_file() else None
    except UserError:  # of another version, or damaged: whoever claims `out` says so
        return None


def keep_goldens(
    out: Path,
    manifest: Manifest,
    earlier: Manifest | None,
    prompts: Sequence[Sequence[int]] | None,
) -> Manifest | None:
    """`manifest` with what `earlier` says of its goldens, if they are of the same weights and,
    where `prompts` are given, of these; None if not, or if a file is not as it was written."""
    if earlier is None or earlier.golden is None or earlier.golden_key != manifest.golden_key:
        return None
    wanted = [
        name
        for adapter in ("", *manifest.adapters)
        for name in golden_files(adapter, manifest.compressed)
    ]
    if not all(_as_written(out / name, earlier.files.get(name)) for name in wanted):
        return None
    from ane_moe.original.golden import read_golden

    if prompts is not None and read_golden(out / GOLDEN).prompts != tuple(map(tuple, prompts)):
        return None
    return replace(manifest, compression=earlier.compression, adapters=earlier.adapters)


def golden_files(adapter: str, compressed: bool) -> tuple[str, ...]:
    """The goldens of a conversion with an adapter switched on, or with none."""
    names = (GOLDEN, GOLDEN_AS_STORED) if compressed else (GOLDEN,)
    end = f"_{adapter}.safetensors" if adapter else ".safetensors"
    return tuple(name.replace(".safetensors", end) for name in names)


def write_goldens(
    job: Job,
    manifest: Manifest,
    prompts: list[list[int]],
    progress: Callable[[str, int, int], None],
) -> Manifest:
    """Write the goldens, of each adapter too; the manifest with what compression cost. Raises
    UserError as `capture_goldens` does."""
    manifest = replace(manifest, **_captured(job, manifest, prompts, progress))
    adapters = {}
    for name, adapter in job.adapters.items():
        own = with_adapter(job, adapter)
        facts = _captured(own, manifest.with_adapter(name), prompts, progress, name)
        files = golden_files(name, manifest.compressed)
        adapters[name] = facts | dict(zip(("golden", "golden_as_stored"), files, strict=False))
    return replace(manifest, adapters=adapters)


def _captured(
    job: Job,
    manifest: Manifest,
    prompts: list[list[int]],
    progress: Callable[[str, int, int], None],
    adapter: str = "",
) -> dict[str, Any]:
    # transformers takes seconds to import
    from ane_moe.kept import Kept
    from ane_moe.original.golden import write_golden
    from ane_moe.original.stored_model import capture_goldens

    with scratch_folder(job.out, "golden") as scratch:
        found = capture_goldens(job, job.out, manifest, prompts, Kept(scratch), progress)
        both = filter(None, (found.original, found.as_stored))
        for golden, name in zip(both, golden_files(adapter, manifest.compressed), strict=True):
            write_golden(golden, job.out / name)
    return {"compression": found.compression}


def remove_goldens(out: Path) -> None:
    """Delete goldens that are of other weights."""
    for path in out.glob(GOLDEN_FILES):
        path.unlink()


def _as_written(path: Path, digest: str | None) -> bool:
    return path.is_file() and os.access(path, os.R_OK) and sha256(path) == digest
