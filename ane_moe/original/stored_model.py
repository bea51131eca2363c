"""The golden of the model as it is stored, and what compression cost each role."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.files import scratch_folder
from ane_moe.manifest import Manifest
from ane_moe.opened import Model
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import Golden
from ane_moe.original.stored_weights import RoleError, write_as_stored
from ane_moe.progress import Progress


def capture_as_stored(
    model: Model, folder: Path, manifest: Manifest, original: Golden, out: Path, progress: Progress
) -> dict[str, RoleError]:
    """Write the golden `out`: Hugging Face's model with the weights that the conversion in `folder`
    holds, on the prompts of `original`. Returns errors by role. Needs disk for a copy of the model,
    and raises UserError as `write_as_stored` and `capture_golden` do."""
    with scratch_folder(out.parent, "as-stored") as scratch:
        progress("golden: weights as stored", 0, 1)
        copy = scratch / "model"
        errors = write_as_stored(model, folder, manifest, copy)
        prompts = [list(ids) for ids in original.prompts]
        capture_golden(
            open_checkpoint(copy),
            layers=manifest.layers,
            prompts=prompts,
            out=out,
            context=manifest.context,
            experts=manifest.routing == "sparse",
            progress=progress,
        )
    return errors


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
