"""The constants of a function as numbers: consts as they lie in the file, compressed weights
expanded."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ane_moe.mlprogram.program import Argument, Constant, Function, Operation, TensorType
from ane_moe.runtime.reference.ops import constexpr

OPS = {op.name: op for op in constexpr.OPS if op.since == 18}


def weight_values(
    function: Function, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value) of each fp16 constant of the weight file and of each constexpr operation (iOS
    18) that an operation uses, one at a time, where its name is `wanted`; others are not read."""
    used = {
        value
        for op in function.block.operations
        if not op.type.startswith("constexpr_")
        for values in op.inputs.values()
        for value in values
        if isinstance(value, str)
    }
    steps: list[Operation] = []  # of one weight; they follow each other
    for op in function.block.operations:
        name = op.outputs[0].name if op.outputs else ""
        if op.type == "const" and op.attributes["val"].blob is not None and _is_fp16(op):
            if wanted(name):
                yield name, np.asarray(op.attributes["val"].load())
        elif op.type.startswith("constexpr_"):
            steps.append(op)
            if name in used:
                if wanted(name):
                    yield name, _expanded(steps).numpy()
                steps.clear()


def _expanded(steps: Sequence[Operation]) -> torch.Tensor:
    made: dict[str, torch.Tensor] = {}
    for op in steps:
        made |= dict(zip([output.name for output in op.outputs], expand(op, made), strict=True))
    return made[steps[-1].outputs[0].name]


def expand(op: Operation, made: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of a constexpr operation; `made` has those of earlier ones."""
    names = tensor_names(op.type)
    tensors = {name: _tensor(op.inputs[name][0], made) for name in names if name in op.inputs}
    immediate = {
        name: int(np.asarray(values[0].load()))
        for name, values in op.inputs.items()
        if name not in names and isinstance(values[0], Constant)
    }
    return run_constexpr(op.type, tensors, immediate)


def tensor_names(type_: str) -> list[str]:
    """The inputs of a constexpr operation that are tensors, in its kernel's order."""
    return [name.rstrip("?") for name in OPS[type_].tensors.split()]


def run_constexpr(
    type_: str, tensors: Mapping[str, torch.Tensor], integers: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """The outputs of a constexpr operation, fp16 where they are real numbers."""
    result = OPS[type_].make(**integers)(*(tensors.get(name) for name in tensor_names(type_)))
    outputs = result if isinstance(result, tuple) else (result,)
    return tuple(value.half() if value.is_floating_point() else value for value in outputs)


def _tensor(value: Argument, made: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(value, str):
        return made[value]
    assert isinstance(value, Constant) and isinstance(value.type, TensorType)
    shape = [size or 0 for size in value.type.shape]
    return torch.from_numpy(np.array(value.load())).reshape(shape)


def _is_fp16(op: Operation) -> bool:
    kind = op.outputs[0].type
    return isinstance(kind, TensorType) and kind.dtype == "fp16"
