"""Expansions as operations of an ML program, as coremltools writes them for iOS 18."""

from collections.abc import Mapping, Sequence

from ane_moe.formats.encoded import Expansion, Shape, Stored
from ane_moe.mlprogram.proto import MIL_pb2

FILE = "@model_path/weights/weight.bin"
DATA_TYPES = {
    "fp16": MIL_pb2.FLOAT16,
    "int8": MIL_pb2.INT8,
    "int4": MIL_pb2.INT4,
    "int32": MIL_pb2.INT32,
    "uint8": MIL_pb2.UINT8,
    "uint6": MIL_pb2.UINT6,
    "uint4": MIL_pb2.UINT4,
    "uint3": MIL_pb2.UINT3,
    "uint2": MIL_pb2.UINT2,
    "uint1": MIL_pb2.UINT1,
}

Offsets = Mapping[str, int]  # of stored inputs in the blob file


def expansion_operations(
    name: str, expansions: Sequence[tuple[Expansion, Offsets]]
) -> list[MIL_pb2.Operation]:
    """The constexpr operations that give the value `name`, in place of a `const` of that name."""
    operations: list[MIL_pb2.Operation] = []
    for number, (expansion, offsets) in enumerate(expansions):
        final = number == len(expansions) - 1
        label = name if final else f"{name}__{number}"
        operation = MIL_pb2.Operation(type=expansion.type)
        _set_string(operation.attributes["name"], label)
        for key, part in expansion.inputs.items():
            argument = operation.inputs[key].arguments.add()
            if isinstance(part, Stored):
                _set_type(argument.value.type, part.type, part.values.shape)
                argument.value.blobFileValue.fileName = FILE
                argument.value.blobFileValue.offset = offsets[key]
            else:
                argument.name = operations[part[0]].outputs[part[1]].name
        for key, integer in expansion.integers.items():
            value = operation.inputs[key].arguments.add().value
            _set_type(value.type, "int32", ())
            value.immediateValue.tensor.ints.values.append(integer)
        for place, (type_, shape) in enumerate(expansion.outputs):
            last = place == len(expansion.outputs) - 1
            output = operation.outputs.add(name=label if last else f"{label}__{place}")
            _set_type(output.type, type_, shape)
        operations.append(operation)
    return operations


def _set_type(target: MIL_pb2.ValueType, type_: str, shape: Shape) -> None:
    target.tensorType.dataType = DATA_TYPES[type_]
    target.tensorType.rank = len(shape)
    for size in shape:
        target.tensorType.dimensions.add().constant.size = size


def _set_string(value: MIL_pb2.Value, text: str) -> None:
    value.type.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.append(text)
