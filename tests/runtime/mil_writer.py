"""Writes packages as compiled models, in the textual form that public .mlmodelc folders have.

There are two: program(1.3), written here for iOS 18, where scalars are `fp16(...)`, and
program(1.0), where they are `tensor<fp16, []>(...)`.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ane_moe.mlprogram.pipeline import OpenPipeline, open_model
from ane_moe.mlprogram.program import (
    Argument,
    Constant,
    DictionaryType,
    Feature,
    Function,
    Interface,
    ListType,
    Operation,
    OtherType,
    Output,
    Program,
    StateType,
    ValueType,
)

TAGS = {"CoreML5": "ios15", "CoreML6": "ios16", "CoreML7": "ios17", "CoreML8": "ios18"}
DTYPES = {"fp16": "Float16", "fp32": "Float32", "int32": "Int32", "fp64": "Double"}
DATA = Path("Data/com.apple.CoreML")


def write_compiled(package: Path, folder: Path) -> Path:
    """The package (a program without nested blocks, or a pipeline of such) compiled."""
    folder.mkdir(parents=True)
    model = open_model(package)
    if not isinstance(model, OpenPipeline):
        program = model.read()
        _write_program(program, package, folder)
        (folder / "metadata.json").write_text(json.dumps([_metadata(program)], indent=2))
        return folder
    for stage in model.stages:
        (folder / f"model{stage.index}").mkdir()
        _write_program(stage.program.read(), package, folder / f"model{stage.index}")
    kinds = [{"name": f"MLModelType_{stage.kind}"} for stage in model.stages]
    metadata = {
        "specificationVersion": model.specification_version,
        "modelType": {"name": "MLModelType_pipeline", "structure": kinds},
        **_schemas(Interface(model.inputs, model.outputs)),
    }
    (folder / "metadata.json").write_text(json.dumps([metadata], indent=2))
    return folder


def _write_program(program: Program, package: Path, folder: Path) -> None:
    modern = all(function.opset == "CoreML8" for function in program.functions.values())
    (folder / "model.mil").write_text(Writer(modern).program(program))
    if (package / DATA / "weights").exists():
        shutil.copytree(package / DATA / "weights", folder / "weights")


@dataclass(frozen=True)
class Writer:
    modern: bool

    def program(self, program: Program) -> str:
        text = "string" if self.modern else "tensor<string, []>"
        functions = "".join(
            self.function(item, program.interfaces[name])
            for name, item in program.functions.items()
        )
        return (
            f"program({'1.3' if self.modern else '1.0'})\n"
            f'[buildInfo = dict<{text}, {text}>({{{{"coremlc-version", "3500.32.1"}}, '
            f'{{"coremltools-version", "9.0"}}}})]\n{{\n{functions}}}\n'
        )

    def function(self, function: Function, interface: Interface) -> str:
        inputs = ", ".join(self.named(item) for item in function.inputs)
        text = "string" if self.modern else "tensor<string, []>"
        defaults = ", ".join(
            f'{{"{feature.name}", {list(feature.type.shape)}}}'
            for feature in interface.inputs
            if feature.ranges or feature.shapes
        )
        flexible = (
            (
                f" [FlexibleShapeInformation = tuple<tuple<{text}, dict<{text}, tensor<int32, "
                f'[?]>>>>((("DefaultShapes", {{{defaults}}})))]'
            )
            if defaults
            else ""
        )
        lines = "".join(f"            {self.operation(op)};\n" for op in function.block.operations)
        return (
            f"    func {function.name}<{TAGS[function.opset]}>({inputs}){flexible} {{\n{lines}"
            f"        }} -> ({', '.join(function.block.outputs)});\n"
        )

    def operation(self, op: Operation) -> str:
        assert not op.blocks, "the form of nested blocks is not known"
        outputs = ", ".join(self.named(item) for item in op.outputs)
        inputs = ", ".join(
            f"{key} = {self.arguments(values)}" for key, values in sorted(op.inputs.items())
        )
        attributes = [
            f"name = {self.text(op.name)}",
            *(f"{key} = {self.value(value)}" for key, value in op.attributes.items()),
        ]
        target = f"{outputs} = " if outputs else ""
        return f"{target}{op.type}({inputs})[{', '.join(attributes)}]"

    def named(self, item: Output) -> str:
        return f"{self.type(item.type)} {item.name}"

    def arguments(self, values: tuple[Argument, ...]) -> str:
        shown = [item if isinstance(item, str) else self.value(item) for item in values]
        return shown[0] if len(shown) == 1 else f"({', '.join(shown)})"

    def type(self, kind: ValueType) -> str:
        if isinstance(kind, StateType):
            return f"state<{self.type(kind.tensor)}>"
        if isinstance(kind, DictionaryType):
            return f"dict<{self.type(kind.key)}, {self.type(kind.value)}>"
        if isinstance(kind, ListType):
            return f"list<{self.type(kind.element)}, {'?' if kind.length is None else kind.length}>"
        if isinstance(kind, OtherType):
            raise ValueError(kind.kind)
        sizes = ", ".join("?" if size is None else str(size) for size in kind.shape)
        return f"tensor<{kind.dtype}, [{sizes}]>" if sizes else self.scalar(kind.dtype)

    def scalar(self, dtype: str) -> str:
        return dtype if self.modern else f"tensor<{dtype}, []>"

    def text(self, text: str) -> str:
        return f"{self.scalar('string')}({quoted(text)})"

    def value(self, value: Constant) -> str:
        if value.blob:
            path, offset, _ = value.blob  # of the data, which the metadata precedes
            file = self.text(f"@model_path/weights/{path.name}")
            place = f"{self.scalar('uint64')}({offset - 64})"
            return f"{self.type(value.type)}(BLOBFILE(path = {file}, offset = {place}))"
        return f"{self.type(value.type)}({literal(value.load())})"


def literal(value: object) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    assert isinstance(value, np.ndarray)
    if value.ndim:
        return f"[{', '.join(literal(np.asarray(row)) for row in value)}]"
    if value.dtype.kind == "f":
        return hexadecimal(float(value))
    return str(value).lower() if value.dtype == bool else str(int(value))


def hexadecimal(value: float) -> str:
    """As C's %a, without Python's trailing zeros."""
    return re.sub(r"\.?0+p", "p", value.hex()) if np.isfinite(value) else str(value)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _metadata(program: Program) -> dict:
    functions = [
        {"name": name, **_schemas(interface)} for name, interface in program.interfaces.items()
    ]
    several = {"functions": functions, "defaultFunctionName": program.default_function}
    default = _schemas(program.interfaces[program.default_function])
    return {
        "specificationVersion": program.specification_version,
        "modelType": {"name": "MLModelType_mlProgram"},
        "userDefinedMetadata": program.metadata,
        **default,
        **(several if len(functions) > 1 else {}),
    }


def _schemas(interface: Interface) -> dict:
    return {
        "inputSchema": list(_schema(interface.inputs)),
        "outputSchema": list(_schema(interface.outputs)),
        "stateSchema": list(_schema(interface.states)),
    }


def _schema(features: Iterable[Feature]) -> Iterable[dict]:
    words = {
        "array": "MultiArray",
        "state": "State",
        "string": "String",
        "image": "Image",
        "dictionary": "Dictionary (String → Double)",
    }
    for feature in features:
        row = {"name": feature.name, "type": words[feature.kind], "isOptional": "0"}
        if feature.kind in ("array", "state"):
            known = [size for size in feature.type.shape if size is not None]
            fixed = len(known) == len(feature.type.shape)
            row |= {"dataType": DTYPES[feature.type.dtype], "shape": str(known if fixed else [])}
        if feature.shapes:
            row["enumeratedShapes"] = str([list(shape) for shape in feature.shapes])
        if feature.ranges:
            row["shapeRange"] = str([list(bounds) for bounds in feature.ranges])
        if feature.kind == "image":
            height, width = feature.type.shape[-2:]
            row |= {"colorspace": feature.layout, "width": str(width), "height": str(height)}
        yield row
