"""A compiled model (`.mlmodelc`) as the protobuf `Model` of the package it was compiled from.

The program is the text in model.mil; what its inputs and outputs are is in metadata.json. Without
that file (the stages of a compiled pipeline have none) the program's own signatures have to do.
The forms are those of public compiled models; Apple documents neither.
"""

import json
from collections.abc import Iterable
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.container import Container, quoted
from ane_moe.mlprogram.description import ARRAY_DTYPES
from ane_moe.mlprogram.mil_text import parse_program
from ane_moe.mlprogram.proto import FeatureTypes_pb2, Model_pb2
from ane_moe.mlprogram.values import DTYPE_NAMES

MAX_METADATA_BYTES = 16 << 20  # real ones have some 5 kB, and a row per function
MAX_STAGES = 64  # of a pipeline
PIPELINE = "MLModelType_pipeline"

_ARRAY_CODES = {name: code for code, name in ARRAY_DTYPES.items()}
_ARRAY_TYPES = {
    "Float16": "fp16",
    "Float32": "fp32",
    "Double": "fp64",
    "Int32": "int32",
    "Int8": "int8",
}
_COLOURS = FeatureTypes_pb2.ImageFeatureType.ColorSpace
_OTHER_KINDS = {
    "String": "stringType",
    "Int64": "int64Type",
    "Double": "doubleType",
    "Dictionary": "dictionaryType",
    "Sequence": "sequenceType",
}
_KINDS = {
    field.name
    for field in Model_pb2.Model.DESCRIPTOR.oneofs_by_name["Type"].fields
    if field.message_type is not None
}
_SPECIFICATIONS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}

_DAMAGED = "the compiled model is damaged, or of a form that is not known here"


def read_compiled(container: Container) -> Any:
    """The model in a folder with model.mil, or a pipeline of such. Raises UserError for others."""
    model = Model_pb2.Model()
    if container.model.suffix == ".json":
        _read_pipeline(container, model)
        return model
    try:
        text = container.model_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError("model.mil is not UTF-8", quoted(error.reason), _DAMAGED) from None
    parse_program(text, model.mlProgram)
    metadata = _read_metadata(container)
    if metadata is None:
        _describe_signatures(model)
    else:
        _describe_model(model, metadata)
    return model


def _read_pipeline(container: Container, model: Any) -> None:
    metadata = _read_metadata(container) or {}
    kinds = _stage_kinds(metadata)
    if not 0 < len(kinds) <= MAX_STAGES:
        raise _unsound("the stages of a pipeline", kinds)
    _describe_model(model, metadata)
    for index, kind in enumerate(kinds):
        stage = model.pipeline.models.add()
        if kind == "mlProgram":
            stage.CopyFrom(read_compiled(container.stage(index)))
        elif kind in _KINDS:
            getattr(stage, kind).SetInParent()


def _read_metadata(container: Container) -> dict | None:
    """metadata.json beside the program, None if there is none. Raises UserError if unsound."""
    data = container.file_beside("metadata.json", MAX_METADATA_BYTES)
    if data is None:
        return None
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("metadata.json is not valid JSON", type(error).__name__, _DAMAGED) from None
    if not isinstance(metadata, list) or len(metadata) != 1 or not isinstance(metadata[0], dict):
        raise _unsound("metadata.json", metadata)
    return metadata[0]


def _stage_kinds(metadata: dict) -> list[str]:
    """The kinds of a compiled pipeline's stages, as the protobuf names them; empty for others."""
    kind = _get(metadata, "modelType", dict, {})
    if _get(kind, "name", str, "") != PIPELINE:
        return []
    stages = [_get(stage, "name", str, "") for stage in _dicts(kind, "structure")]
    return [name.removeprefix("MLModelType_") for name in stages]


def _describe_model(model: Any, metadata: dict) -> None:
    """Fill the specification version and description of `model` from metadata.json."""
    version = _get(metadata, "specificationVersion", int, 0)
    if not 0 <= version < 1 << 31:
        raise _unsound("specificationVersion", version)
    model.specificationVersion = version
    description = model.description
    functions = _dicts(metadata, "functions")
    for function in functions:
        described = description.functions.add(name=_get(function, "name", str, ""))
        _describe(described, function)
    if functions:
        description.defaultFunctionName = _get(metadata, "defaultFunctionName", str, "")
    else:
        _describe(description, metadata)
    told = description.metadata
    told.author = _get(metadata, "author", str, "")
    told.license = _get(metadata, "license", str, "")
    told.shortDescription = _get(metadata, "shortDescription", str, "")
    told.versionString = _get(metadata, "version", str, "")
    for key, value in _get(metadata, "userDefinedMetadata", dict, {}).items():
        told.userDefined[_text(key)] = _text(value)


def _describe(described: Any, schema: dict) -> None:
    for name, features in (
        ("inputSchema", described.input),
        ("outputSchema", described.output),
        ("stateSchema", described.state),
    ):
        for feature in _dicts(schema, name):
            _feature(features.add(), feature)


def _feature(proto: Any, feature: dict) -> None:
    proto.name = _get(feature, "name", str, "")
    proto.type.isOptional = _get(feature, "isOptional", str, "0") == "1"
    word = _get(feature, "type", str, "").split(" ")[0]
    if word == "MultiArray":
        _array(proto.type.multiArrayType, feature)
    elif word == "State":
        _array(proto.type.stateType.arrayType, feature)
    elif word == "Image":
        _image(proto.type.imageType, feature)
    elif word in _OTHER_KINDS:
        getattr(proto.type, _OTHER_KINDS[word]).SetInParent()
    else:
        raise UserError(
            "metadata.json describes a feature of an unknown type", quoted(word), _DAMAGED
        )


def _array(array: Any, feature: dict) -> None:
    dtype = _ARRAY_TYPES.get(_get(feature, "dataType", str, ""))
    if dtype is None:
        raise _unsound("dataType", feature.get("dataType"))
    array.dataType = _ARRAY_CODES[dtype]
    array.shape.extend(_numbers(_parsed(feature, "shape")))
    for shape in _parsed(feature, "enumeratedShapes"):
        array.enumeratedShapes.shapes.add().shape.extend(_numbers(shape))
    for bounds in _parsed(feature, "shapeRange"):
        lower, upper, *rest = (*_numbers(bounds), 0, 0)
        if len(rest) != 2 or lower < 0:
            raise _unsound("shapeRange", bounds)
        array.shapeRange.sizeRanges.add(lowerBound=lower, upperBound=upper)


def _image(image: Any, feature: dict) -> None:
    colour = _get(feature, "colorspace", str, "").upper()
    if colour.startswith("GRAY"):
        image.colorSpace = _COLOURS.Value("GRAYSCALE_FLOAT16" if "16" in colour else "GRAYSCALE")
    elif colour in ("RGB", "BGR"):
        image.colorSpace = _COLOURS.Value(colour)
    elif _get(feature, "isColor", str, "") == "0":
        image.colorSpace = _COLOURS.Value("GRAYSCALE")
    else:
        raise _unsound("colorspace", colour)
    sizes = [_get(feature, key, str, "") for key in ("width", "height")]
    if not all(size.isdecimal() and len(size) < 7 for size in sizes):
        raise _unsound("width and height", sizes)
    image.width, image.height = map(int, sizes)


# ---- without metadata.json


def _describe_signatures(model: Any) -> None:
    """Each function's inputs and outputs as the program declares them; images are arrays then."""
    for name, function in sorted(model.mlProgram.functions.items()):
        model.specificationVersion = _SPECIFICATIONS.get(function.opset, 0)
        described = model.description
        if len(model.mlProgram.functions) > 1 or name != "main":
            described = model.description.functions.add(name=name)
        types = {item.name: item.type for item in function.inputs}
        for item in function.inputs:
            is_state = item.type.HasField("stateType")
            _signature((described.state if is_state else described.input).add(), item.name, types)
        for block in function.block_specializations.values():
            types |= {item.name: item.type for op in block.operations for item in op.outputs}
            for output in block.outputs:
                _signature(described.output.add(), output, types)


def _signature(proto: Any, name: str, types: dict[str, Any]) -> None:
    proto.name = name
    kind = types.get(name)
    wrapped = kind.stateType.wrappedType if kind and kind.HasField("stateType") else kind
    if not wrapped or not wrapped.HasField("tensorType"):
        proto.type.dictionaryType.SetInParent()
        return
    tensor = wrapped.tensorType
    dtype = DTYPE_NAMES[tensor.dataType]
    if dtype not in _ARRAY_CODES:
        proto.type.stringType.SetInParent()
        return
    is_state = wrapped is not kind
    array = proto.type.stateType.arrayType if is_state else proto.type.multiArrayType
    array.dataType = _ARRAY_CODES[dtype]
    if all(dimension.HasField("constant") for dimension in tensor.dimensions):
        array.shape.extend(min(item.constant.size, (1 << 63) - 1) for item in tensor.dimensions)


# ---- untrusted JSON


def _get(holder: dict, key: str, kind: type, default: Any) -> Any:
    value = holder.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _unsound(key, value)
    return _text(value) if isinstance(value, str) else value


def _text(value: object) -> str:
    """Text that protobuf takes: no lone surrogates."""
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise _unsound("metadata.json", value)
    return value


def _dicts(holder: dict, key: str) -> list[dict]:
    items = _get(holder, key, list, [])
    if not all(isinstance(item, dict) for item in items):
        raise _unsound(key, items)
    return items


def _parsed(feature: dict, key: str) -> Iterable[Any]:
    """A list that metadata.json writes as text, such as "[1, 8]"; empty if it has none."""
    try:
        value = json.loads(_get(feature, key, str, "[]"))
    except (ValueError, RecursionError):
        raise _unsound(key, feature[key]) from None
    if not isinstance(value, list):
        raise _unsound(key, value)
    return value


def _numbers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _unsound("a shape", value)
    if not all(-1 <= item < 1 << 63 for item in value):
        raise _unsound("a shape", value)
    return value


def _unsound(what: str, found: object) -> UserError:
    return UserError(f"metadata.json does not hold what it should: {what}", quoted(found), _DAMAGED)
