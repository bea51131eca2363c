"""Both goldens of a conversion in one pass over the checkpoint: of the original model, and of the
model as it is stored; and what compression cost each role."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.kept import Kept
from ane_moe.manifest import Manifest
from ane_moe.opened import Model
from ane_moe.original.capture import capture, prompts_for
from ane_moe.original.golden import Golden
from ane_moe.original.stored_weights import RoleError, StoredTensors
from ane_moe.original.stream import OriginalTensors, StreamedModel
from ane_moe.progress import Progress
from ane_moe.quiet_transformers import quiet_transformers


@dataclass(frozen=True)
class Goldens:
    """The original model's, and for compressed weights the one of the model as it is stored;
    `compression` as in `Manifest`, with errors."""

    original: Golden
    as_stored: Golden | None
    compression: dict[str, dict[str, Any]]


def capture_goldens(
    model: Model,
    folder: Path,
    manifest: Manifest,
    prompts: list[list[int]],
    kept: Kept,
    progress: Progress,
    *,
    through: Sequence[int] | None = None,
) -> Goldens:
    """Run the checkpoint's model, and with compressed weights also the one that the conversion in
    `folder` stores, over `prompts`, `through` all layers up to the last converted one (None) or
    these alone. Raises UserError as `capture_golden` and `StoredTensors` do."""
    with quiet_transformers():
        streams = [StreamedModel(OriginalTensors(model.checkpoint))]
        ids = prompts_for(streams[0], prompts, manifest.context)
        stored = StoredTensors(model, folder, manifest) if manifest.compressed else None
        streams += [StreamedModel(stored)] if stored else []
        goldens = capture(
            streams,
            manifest.layers,
            ids,
            kept,
            experts=any(shard.dispatched for shard in manifest.shards),
            stored=stored,
            through=through,
            progress=progress,
        )
    errors = stored.errors if stored else {}
    as_stored = goldens[1] if stored else None
    return Goldens(goldens[0], as_stored, with_errors(manifest.compression, errors))


def with_errors(
    compression: Mapping[str, Mapping[str, Any]], errors: Mapping[str, RoleError]
) -> dict[str, dict[str, Any]]:
    """The table of `Manifest.compression` with relative L2 errors of the roles and of their
    layers."""
    return {
        role: dict(facts) | (_errors(errors[role]) if role in errors else {})
        for role, facts in compression.items()
    }


def _errors(error: RoleError) -> dict[str, Any]:
    layers = {str(layer): _relative(*sums) for layer, sums in sorted(error.layers.items())}
    return _relative(error.squared, error.total, error.bare) | {"layers": layers}


def _relative(squared: float, total: float, bare: float) -> dict[str, float | None]:
    share = math.sqrt(squared / total) if total else 0.0
    return {
        "relative_error": share,
        "relative_error_without_directions": math.sqrt(bare / total) if bare else None,
    }
