"""Placement of a whole conversion: measured where Core ML is, predicted elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ane_moe.manifest import read_manifest
from ane_moe.placement.feedback import compare, feedback, write_feedback
from ane_moe.placement.machine import matching_target, this_machine
from ane_moe.placement.predicted import predict
from ane_moe.placement.result import PlacementReport
from ane_moe.placement.targets import Target
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
    be read.
    """
    packages = [(out / shard.path, shard.path) for shard in read_manifest(out).shards]
    if resolve_runtime(runtime) != "coreml":
        return predict(packages, target, allow=allow, require_measured=require_measured)
    from ane_moe.placement.measured import measure  # coremltools takes a second to import

    measured = measure(packages, allow=allow, progress=progress, **options)
    predicted = predict(packages, matching_target(this_machine(), target))
    expected = {(row.path, row.function): row.stretches for row in predicted.functions}
    functions = tuple(
        replace(row, expected=expected.get((row.path, row.function), ()))
        for row in measured.functions
    )
    measured = replace(
        measured,
        functions=functions,
        comparison=compare(predicted, measured),
        require_measured=require_measured,
    )
    write_feedback(feedback(predicted, measured, packages), out)
    return measured
