"""The model description: what each function takes and gives, checked against the function
itself."""

from collections.abc import Collection, Iterable
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.container import quoted
from ane_moe.mlprogram.program import (
    Block,
    Feature,
    Function,
    Interface,
    OtherType,
    StateType,
    TensorType,
    ValueType,
)
from ane_moe.mlprogram.proto import FeatureTypes_pb2
from ane_moe.mlprogram.values import describe

_Array = FeatureTypes_pb2.ArrayFeatureType
ARRAY_DTYPES = {
    _Array.FLOAT16: "fp16",
    _Array.FLOAT32: "fp32",
    _Array.DOUBLE: "fp64",
    _Array.INT32: "int32",
    _Array.INT8: "int8",
}

# proto name of a feature's type -> `Feature.kind`
_KINDS = {
    "multiArrayType": "array",
    "stateType": "state",
    "imageType": "image",
    "dictionaryType": "dictionary",
    "stringType": "string",
    "int64Type": "int64",
    "doubleType": "double",
    "sequenceType": "sequence",
}

_Image = FeatureTypes_pb2.ImageFeatureType
_LAYOUTS = {
    _Image.RGB: "RGB",
    _Image.BGR: "BGR",
    _Image.GRAYSCALE: "grayscale",
    _Image.GRAYSCALE_FLOAT16: "grayscale fp16",
}

_DAMAGED = "the package is damaged, or its converter is faulty"


def described_functions(description: Any, functions: Collection[str]) -> tuple[dict[str, Any], str]:
    """The description of each function by name, in declared order, and the name of the default
    function.

    Raises UserError where it names other functions than the program has.
    """
    described = {item.name: item for item in description.functions}
    if len(described) != len(description.functions):
        raise UserError("the description names a function twice", quoted(list(described)), _DAMAGED)
    if not described:
        described = {"main": description}
    if described.keys() != set(functions):
        raise UserError(
            "the description and the program name different functions",
            quoted(f"{sorted(described)} and {sorted(functions)}"),
            _DAMAGED,
        )
    default = description.defaultFunctionName or next(iter(described))
    if default not in described:
        raise UserError(
            "the default function does not exist",
            quoted(default),
            f"known: {quoted(sorted(described))}",
        )
    return described, default


def read_metadata(proto: Any) -> dict[str, str]:
    """Author, license, versions and the user-defined keys, empty ones left out."""
    fields = {
        "author": proto.author,
        "license": proto.license,
        "description": proto.shortDescription,
        "version": proto.versionString,
        **{key: proto.userDefined[key] for key in sorted(proto.userDefined)},
    }
    return {key: value for key, value in fields.items() if value}


def read_interface(proto: Any, function: Function) -> Interface:
    """What a function takes and gives, as described. Raises UserError where the function itself
    says otherwise."""
    declared = {item.name: item.type for item in function.inputs}
    given = _types_of(function.block)
    outputs = {name: given.get(name) or declared[name] for name in function.block.outputs}
    interface = Interface(
        tuple(_feature(item, declared, function.name) for item in proto.input),
        tuple(_feature(item, outputs, function.name) for item in proto.output),
        tuple(_feature(item, declared, function.name) for item in proto.state),
    )
    described = [item.name for item in (*interface.inputs, *interface.states)]
    if sorted(described) != sorted(declared):
        raise UserError(
            f"the description of function {quoted(function.name)} names other inputs than it has",
            quoted(f"{described} for {list(declared)}"),
            _DAMAGED,
        )
    return interface


def described_feature(proto: Any) -> Feature:
    """A feature of a pipeline, whose stages declare the types: as described. Raises UserError."""
    where = f"feature {quoted(proto.name)} of the pipeline"
    kind = proto.type.WhichOneof("Type")
    declared: ValueType = OtherType("other")
    if kind == "imageType":
        channels = 3 if proto.type.imageType.colorSpace in (_Image.RGB, _Image.BGR) else 1
        declared = TensorType("fp32", (1, channels, None, None))
    elif kind == "multiArrayType":
        array = proto.type.multiArrayType
        shapes, ranges = _flexibility(array, where)
        dtype = _array_dtype(array, where)
        declared = TensorType(dtype, _default_shape(array, shapes, ranges, TensorType(dtype, ())))
    return _feature(proto, {proto.name: declared}, "the pipeline")


def _types_of(block: Block) -> dict[str, ValueType]:
    return {item.name: item.type for operation in block.operations for item in operation.outputs}


def _feature(proto: Any, declared: dict[str, ValueType], function: str) -> Feature:
    where = f"feature {quoted(proto.name)} of function {quoted(function)}"
    if proto.name not in declared:
        raise UserError(f"{where} does not exist in the program", quoted(list(declared)), _DAMAGED)
    kind = proto.type.WhichOneof("Type")
    if kind not in _KINDS:
        raise UserError(f"{where} has no type", "an empty type", _DAMAGED)
    actual = declared[proto.name]
    if (kind == "stateType") != isinstance(actual, StateType):
        raise UserError(
            f"{where} is described as another kind than the program has", describe(actual), _DAMAGED
        )
    tensor = actual.tensor if isinstance(actual, StateType) else actual
    if kind == "imageType" and isinstance(tensor, TensorType):
        return _image(proto, tensor, where)
    if kind not in ("multiArrayType", "stateType"):
        shown = tensor if isinstance(tensor, TensorType) else TensorType(_KINDS[kind], ())
        return Feature(proto.name, shown, proto.type.isOptional, kind=_KINDS[kind])
    array = (
        proto.type.multiArrayType if kind == "multiArrayType" else proto.type.stateType.arrayType
    )
    if not isinstance(tensor, TensorType):
        raise UserError(f"{where} is described as an array", describe(tensor), _DAMAGED)
    shapes, ranges = _flexibility(array, where)
    described = TensorType(
        _array_dtype(array, where), _default_shape(array, shapes, ranges, tensor)
    )
    _check_agreement(described, tensor, where)
    for shape in shapes:
        _check_agreement(TensorType(described.dtype, shape), tensor, where)
    default = _default(array, described.dtype, where) if proto.type.isOptional else None
    return Feature(
        proto.name, described, proto.type.isOptional, shapes, ranges, _KINDS[kind], default=default
    )


def _image(proto: Any, tensor: TensorType, where: str) -> Feature:
    """An image: the program's shape [..., channels, height, width], in the sizes described."""
    image = proto.type.imageType
    if image.colorSpace not in _LAYOUTS:
        raise UserError(
            f"{where} has an unknown colour layout", f"code {image.colorSpace}", _DAMAGED
        )
    if len(tensor.shape) < 3:
        raise UserError(f"{where} is described as an image", describe(tensor), _DAMAGED)
    *lead, height, width = tensor.shape
    shape = (*lead, height or image.height, width or image.width)
    outer = tuple(size or 1 for size in lead)
    shapes = tuple((*outer, size.height, size.width) for size in image.enumeratedSizes.sizes)
    ranges = None
    if image.HasField("imageSizeRange"):
        sizes = image.imageSizeRange
        axes = (sizes.heightRange, sizes.widthRange)
        bounds = [(axis.lowerBound, axis.upperBound) for axis in axes]
        ranges = (*((size, size) for size in outer), *bounds)
    return Feature(
        proto.name,
        TensorType(tensor.dtype, shape),
        proto.type.isOptional,
        shapes,
        ranges,
        "image",
        _LAYOUTS[image.colorSpace],
    )


def _default(array: Any, dtype: str, where: str) -> int | float | None:
    """The value of each element of an optional input that is not given; None: it has none."""
    kind = array.WhichOneof("defaultOptionalValue")
    if kind is None:
        return None
    value: int | float = getattr(array, kind)
    if dtype.startswith("int") and not (isinstance(value, int) and -(1 << 31) <= value < 1 << 31):
        raise UserError(
            f"{where} has a default value of another type", f"{value} for {dtype}", _DAMAGED
        )
    return value


def _array_dtype(array: Any, where: str) -> str:
    if array.dataType not in ARRAY_DTYPES:
        raise UserError(
            f"{where} has an unknown element type",
            f"code {array.dataType}",
            "a newer ane-moe may know it",
        )
    return ARRAY_DTYPES[array.dataType]


def _flexibility(
    array: Any, where: str
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...] | None]:
    kind = array.WhichOneof("ShapeFlexibility")
    if kind == "enumeratedShapes":
        shapes = tuple(tuple(item.shape) for item in array.enumeratedShapes.shapes)
        if not shapes or any(size < 0 for shape in shapes for size in shape):
            raise UserError(f"{where} has no usable enumerated shape", quoted(shapes), _DAMAGED)
        return shapes, None
    if kind == "shapeRange":
        ranges = tuple((item.lowerBound, item.upperBound) for item in array.shapeRange.sizeRanges)
        if any(upper >= 0 and lower > upper for lower, upper in ranges):
            raise UserError(f"{where} has an impossible shape range", quoted(ranges), _DAMAGED)
        return (), ranges
    return (), None


def _default_shape(
    array: Any,
    shapes: Iterable[tuple[int, ...]],
    ranges: tuple[tuple[int, int], ...] | None,
    tensor: TensorType,
) -> tuple[int | None, ...]:
    """The described shape, else the first enumerated one, else the lower bounds, else the program's
    own."""
    if array.shape:
        return tuple(array.shape)
    if ranges is not None:
        return tuple(lower for lower, _ in ranges)
    return next(iter(shapes), tensor.shape)


def _check_agreement(described: TensorType, actual: TensorType, where: str) -> None:
    same = described.dtype == actual.dtype and len(described.shape) == len(actual.shape)
    if not same or any(
        b is not None and a != b for a, b in zip(described.shape, actual.shape, strict=True)
    ):
        raise UserError(
            f"{where} is described otherwise than the program has it",
            f"{describe(described)} for {describe(actual)}",
            _DAMAGED,
        )
