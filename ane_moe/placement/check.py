"""Placement of a whole conversion: measured where Core ML is, predicted elsewhere."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.manifest import Manifest, read_manifest
from ane_moe.package_form import PACKAGE
from ane_moe.placement.feedback import compare, feedback, write_feedback
from ane_moe.placement.machine import matching_target, this_machine
from ane_moe.placement.predicted import predict
from ane_moe.placement.result import PlacementReport
from ane_moe.placement.targets import Target, find_target
from ane_moe.runtime import resolve_runtime


def check_placement(
    out: Path,
    target: Target,
    *,
    runtime: str = "auto",
    allow: tuple[str, ...] = (),
    require_measured: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> PlacementReport:
    """Where every function of the conversion in `out` runs. `options` go to `compute_plan.measure`.

    With the coreml runtime it is measured, held against a prediction for this machine (`target`
    where the rules do not know it), and `placement-feedback.json` is left in `out`. Otherwise it is
    predicted for `target`. Raises UserError when there is no conversion, or a package of it cannot
    be read, and for Core AI's assets.
    """
    manifest = read_manifest(out)
    require_packages(manifest)
    packages = [(out / shard.path, shard.path) for shard in manifest.packages]
    if resolve_runtime(runtime) != "coreml":
        return predict(packages, target, allow=allow, require_measured=require_measured)
    from ane_moe.placement.measured import measure  # coremltools takes a second to import

    measured = measure(packages, allow=allow, progress=progress, **options)
    predicted = predict(packages, matching_target(this_machine(), target))
    measured = _compared(measured, predicted)
    write_feedback(feedback(predicted, measured, packages), out)
    return replace(measured, require_measured=require_measured)


def require_packages(manifest: Manifest) -> None:
    """Raise UserError for Core AI's assets: nothing says where they run."""
    if manifest.package_form != PACKAGE:
        raise UserError(
            "nothing is said of where Core AI's assets run: it has no compute plan",
            f"{manifest.package_form} packages",
            "convert with --format mlpackage",
        )


@dataclass(frozen=True)
class Probed:
    """What Core ML made of the probes: the feedback file and its content, and how many operations
    were placed."""

    path: Path
    document: dict[str, Any]
    ops: int


def probe_machine(
    folder: Path, *, progress: Callable[[str, int, int], None] | None = None, **options: Any
) -> Probed:
    """Have Core ML place small packages that hold an operation for every estimate, and leave
    `placement-feedback.json` in `folder`. `options` go to `measure`.

    Raises UserError where Core ML is not there.
    """
    from ane_moe.placement.measured import measure
    from ane_moe.placement.probes import write_probes
    from ane_moe.runtime.coreml.runtime import require_core_ml

    require_core_ml()
    with tempfile.TemporaryDirectory() as scratch:
        packages = write_probes(Path(scratch))
        measured = measure(packages, progress=progress, numerics=False, **options)
        predicted = predict(packages, matching_target(this_machine(), find_target()))
        document = feedback(predicted, _compared(measured, predicted), packages)
    ops = sum(len(row.ops) for row in measured.functions)
    return Probed(write_feedback(document, folder), document, ops)


def _compared(measured: PlacementReport, predicted: PlacementReport) -> PlacementReport:
    """With what was predicted of each function, and how each rule fared."""
    expected = {(row.path, row.function): row.stretches for row in predicted.functions}
    functions = tuple(
        replace(row, expected=expected.get((row.path, row.function), ()))
        for row in measured.functions
    )
    return replace(measured, functions=functions, comparison=compare(predicted, measured))
