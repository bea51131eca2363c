"""The goldens beside a conversion's shards: captured, or kept from an earlier run."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ane_moe.checkpoint import Checkpoint, TensorSource
from ane_moe.compress.recipe import FP16
from ane_moe.errors import UserError
from ane_moe.manifest import FILE_NAME, Manifest, read_manifest
from ane_moe.package import ContentKey, sha256
from ane_moe.plan import ConversionPlan

GOLDEN = "golden.safetensors"
GOLDEN_AS_STORED = "golden_as_stored.safetensors"


def golden_key(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    conversion: ConversionPlan,
    content_keys: Iterable[str],
) -> str:
    """What goldens depend on besides prompts, as sha256 (hex).

    `content_keys` are of the shards and the embedding table, and so of the tensors they hold.
    Other tensors that a golden is made of are read here.
    """
    facts = (checkpoint.config, conversion.layers, conversion.context, conversion.options.routing)
    key = ContentKey(facts, sorted(content_keys))
    weights = [weight for shard in conversion.shards for weight in shard.weights.values()]
    held = {"embed.weight", *(w.name for w in weights if isinstance(w, TensorSource))}
    for name, source in sources.items():
        layer = re.match(r"layers\.(\d+)", name)
        after = layer is not None and int(layer[1]) > max(conversion.layers)
        if name not in held and not after:
            checkpoint.feed(source, key)
    return key.digest()


def finished(out: Path) -> Manifest | None:
    """The manifest of an earlier run that was finished in `out`."""
    try:
        return read_manifest(out) if (out / FILE_NAME).is_file() else None
    except UserError:           # of another version, or damaged: whoever claims `out` says so
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
    wanted = [GOLDEN] if manifest.weights == FP16.name else [GOLDEN, GOLDEN_AS_STORED]
    if not all(_as_written(out / name, earlier.files.get(name)) for name in wanted):
        return None
    from ane_moe.verification.golden import read_golden

    if prompts is not None and read_golden(out / GOLDEN).prompts != tuple(map(tuple, prompts)):
        return None
    return replace(manifest, compression=earlier.compression)


def capture_goldens(
    checkpoint: Path,
    out: Path,
    conversion: ConversionPlan,
    manifest: Manifest,
    prompts: list[list[int]],
    progress: Callable[[str, int, int], None],
) -> Manifest:
    """Write the goldens; the manifest with what compression cost. Raises UserError as
    `capture_golden` and `write_as_stored` do."""
    # transformers takes seconds to import
    from ane_moe.verification.golden import capture_golden, read_golden
    from ane_moe.verification.stored_model import capture_as_stored, with_errors

    capture_golden(
        checkpoint,
        layers=conversion.layers,
        prompts=prompts,
        out=out / GOLDEN,
        context=conversion.context,
        experts=conversion.options.routing == "sparse",
        progress=progress,
    )
    if manifest.weights == FP16.name:
        return manifest
    original = read_golden(out / GOLDEN)
    stored = out / GOLDEN_AS_STORED
    errors = capture_as_stored(checkpoint, out, manifest, original, stored, progress)
    return replace(manifest, compression=with_errors(manifest.compression, errors))


def remove_goldens(out: Path) -> None:
    """Delete goldens that are of other weights."""
    for name in (GOLDEN, GOLDEN_AS_STORED):
        (out / name).unlink(missing_ok=True)


def _as_written(path: Path, digest: str | None) -> bool:
    return path.is_file() and os.access(path, os.R_OK) and sha256(path) == digest
