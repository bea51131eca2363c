"""The compute plan of one function, in a process that may crash or hang: what `compute_plan` asks
for.

Core ML's plan, as coremltools offers it, covers a package's default function only (coremltools 9,
compute_plan.py has no function argument). So each function gets a copy of the package, its weights
hard-linked, in which it is the default.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.container import open_container
from ane_moe.mlprogram.program import TensorType
from ane_moe.mlprogram.proto import Model_pb2
from ane_moe.mlprogram.reader import read_program
from ane_moe.placement.analytics import Shape, find_analytics
from ane_moe.runtime.coreml.trial import serve

DEVICES = {
    "MLNeuralEngineComputeDevice": "ane",
    "MLGPUComputeDevice": "gpu",
    "MLCPUComputeDevice": "cpu",
}


def copy_with_default(package: Path, function: str, destination: Path) -> Path:
    """A copy of `package` in the folder `destination` whose default function is `function`.

    Every file but the program is a hard link; where the file system allows none, a copy. Raises
    UserError for what is not a package.
    """
    container = open_container(package)
    copy = destination / package.name
    for path in sorted(container.root.rglob("*")):
        target = copy / path.relative_to(container.root)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path == container.model:
            target.parent.mkdir(parents=True, exist_ok=True)
            model = Model_pb2.Model.FromString(container.model_bytes())
            model.description.defaultFunctionName = function
            target.write_bytes(model.SerializeToString(deterministic=True))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
    return copy


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another volume, or a file system without hard links
        shutil.copyfile(path, target)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`request`: package, function, units (a key of coreml.UNITS), a folder for what is made on the
    way. Beside the plan, what Core ML's segmenter left in its cache, if it did."""
    try:
        with tempfile.TemporaryDirectory(dir=request["folder"]) as scratch:
            package, function = Path(request["package"]), request["function"]
            ops = _plan(package, function, request["units"], Path(scratch))
            segments = find_analytics(_shapes(package, function), Path.home())
            return {"ops": ops, "segments": [segment.as_json() for segment in segments]}
    except UserError as error:
        return {"error": str(error)}
    except RuntimeError as error:  # how native errors arrive
        return {"error": " ".join(str(error).split())}


def _plan(package: Path, function: str, units: str, scratch: Path) -> list[dict[str, Any]]:
    from ane_moe.coreml_tools import ct
    from ane_moe.runtime.coreml.runtime import UNITS

    copy = copy_with_default(package, function, scratch)
    compiled = scratch / "model.mlmodelc"
    ct.models.utils.compile_model(str(copy), str(compiled))
    plan = ct.models.compute_plan.MLComputePlan.load_from_path(str(compiled), UNITS[units])
    program = plan.model_structure.program
    if program is None or function not in program.functions:
        return []
    return [
        _operation(plan, operation) for operation in _operations(program.functions[function].block)
    ]


def _shapes(package: Path, function: str) -> dict[str, Shape]:
    """Of every operation's first output, by its name."""
    results = (
        operation.outputs[0]
        for operation in read_program(package).functions[function].block.operations
        if operation.outputs
    )
    return {item.name: item.type.shape for item in results if isinstance(item.type, TensorType)}


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _operation(plan: Any, operation: Any) -> dict[str, Any]:
    """Names come as `ios18.conv`, and some bare (`const`, `pad`)."""
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return {
        "name": operation.outputs[0].name if operation.outputs else None,
        "type": operation.operator_name.rpartition(".")[2],
        "device": None if usage is None else _device(usage.preferred_compute_device),
        "supported": []
        if usage is None
        else [_device(device) for device in usage.supported_compute_devices],
        "cost": None if cost is None else cost.weight,
    }


def _device(device: Any) -> str:
    return DEVICES[type(device).__name__]


if __name__ == "__main__":
    serve(_answer)
