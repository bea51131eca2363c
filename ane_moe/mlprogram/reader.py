"""An .mlpackage on disk -> `Program`. The input is untrusted: each thing wrong with it is one
UserError."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from ane_moe.errors import UserError
from ane_moe.mlprogram.compiled import read_compiled
from ane_moe.mlprogram.container import Container, open_container, quoted
from ane_moe.mlprogram.description import described_functions, read_interface, read_metadata
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    Function,
    Operation,
    Output,
    Program,
)
from ane_moe.mlprogram.proto import Model_pb2
from ane_moe.mlprogram.values import ValueReader, describe, read_type
from ane_moe.mlprogram.wire import count_messages

SPECIFICATIONS = range(6, 11)  # iOS 15 to iOS 26
MAX_MESSAGES = 4_000_000  # 80,000 operations; about 250 MB once parsed
SHOWN = 20  # functions an error lists at most
UNCOUNTED_BYTES = 8 << 20  # smaller files cannot pass that memory whatever they hold
OPSETS = ("CoreML5", "CoreML6", "CoreML7", "CoreML8", "CoreML9")  # iOS 15, 16, 17, 18, 26

# What the operations that shape a program must have: inputs with one argument each, blocks, outputs
# (None: any number).
_STRUCTURE: dict[str, tuple[tuple[str, ...], int, int | None]] = {
    "cond": (("pred",), 2, None),
    "while_loop": ((), 2, None),
    "read_state": (("input",), 0, 1),
    "write_state": (("input", "data"), 0, 0),
}

_DAMAGED = "the package is damaged, or its converter is faulty"


@dataclass(frozen=True)
class OpenProgram:
    """An .mlpackage whose program has been parsed, and whose functions are read when asked for."""

    path: Path
    functions: tuple[str, ...]  # in declared order
    default_function: str
    _model: Any
    _described: dict[str, Any]
    _values: ValueReader

    def read(self, names: Iterable[str] | None = None) -> Program:
        """The program, with the functions named or all of them, and without its weights: constants
        stay in the blob file until their `load()` is called.

        Names are resolved and types parsed, but no operation is checked against its semantics.
        Raises UserError for an unknown name and for anything in these functions that is not sound.
        """
        chosen = self.functions if names is None else tuple(names)
        for name in chosen:
            self.require(name)
        protos = self._model.mlProgram.functions
        functions = {name: _function(name, protos[name], self._values) for name in chosen}
        return Program(
            path=self.path,
            functions=functions,
            interfaces={
                name: read_interface(self._described[name], functions[name]) for name in chosen
            },
            default_function=self.default_function,
            specification_version=self._model.specificationVersion,
            metadata=read_metadata(self._model.description.metadata),
            absent=tuple(map(str, self._values.absent.values())),
        )

    def require(self, name: str) -> None:
        """Raise UserError unless there is a function of this name."""
        if name not in self._described:
            raise UserError(
                f"no function {quoted(name)} in {self.path.name}",
                do=f"its functions: {', '.join(self.functions[:SHOWN])}",
            )


def open_program(path: Path, *, require_weights: bool = True) -> OpenProgram:
    """Parse a package. Raises UserError for anything that is not an ML Program with functions.

    Without `require_weights` its weight files may be absent: see `ValueReader`.
    """
    path = Path(path)
    container = open_container(path)
    return program_of(read_model(container), path, ValueReader(container, require_weights))


def read_model(container: Container) -> Any:
    """The protobuf `Model` of a package or compiled model, of whatever kind. Raises UserError."""
    return read_compiled(container) if container.compiled else _parse(container.model_bytes())


def pipeline_models(model: Any) -> list[Any]:
    """The models in a row that `model` consists of, none where it is no pipeline."""
    kind = model.WhichOneof("Type") or ""
    if not kind.startswith("pipeline"):
        return []
    return list((model.pipeline if kind == "pipeline" else getattr(model, kind).pipeline).models)


def program_of(model: Any, path: Path, values: ValueReader) -> OpenProgram:
    """The ML Program that `model` is. Raises UserError for another kind and for an unsound one."""
    kind = model.WhichOneof("Type")
    if models := pipeline_models(model):
        kinds = ", ".join(stage.WhichOneof("Type") or "unknown" for stage in models)
        raise UserError(
            "not one ML Program but a pipeline",
            f"stages: {kinds}",
            "`ane-moe inspect` shows it, `ane-moe run --runtime reference` runs it",
        )
    if kind != "mlProgram":
        raise UserError(
            "not an ML Program", f"a model of kind {kind}", "convert it with convert_to='mlprogram'"
        )
    if model.specificationVersion not in SPECIFICATIONS:
        raise UserError(
            "unknown specification version",
            str(model.specificationVersion),
            f"ML Programs have {SPECIFICATIONS.start} to {SPECIFICATIONS.stop - 1}",
        )
    names = sorted(model.mlProgram.functions)
    if not names:
        raise UserError("program has no functions", "an empty program", _DAMAGED)
    described, default = described_functions(model.description, names)
    return OpenProgram(path, tuple(described), default, model, described, values)


def read_program(path: Path, *, require_weights: bool = True) -> Program:
    """Read a whole package; `load()` of its constants reads the weights, as in `open_program`.

    Raises UserError for anything that is not a sound ML Program.
    """
    return open_program(path, require_weights=require_weights).read()


def _parse(data: bytes) -> Any:
    model = Model_pb2.Model()
    if (
        len(data) > UNCOUNTED_BYTES
        and count_messages(data, Model_pb2.Model, MAX_MESSAGES) == MAX_MESSAGES
    ):
        raise UserError(
            "the program has too many parts", f"{MAX_MESSAGES} or more", "cut it into shards"
        )
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError) as error:  # truncated, nested too deep, not UTF-8
        raise UserError("the program file cannot be parsed", quoted(str(error)), _DAMAGED) from None
    return model


def _function(name: str, proto: Any, values: ValueReader) -> Function:
    where = f"function {quoted(name)}"
    if proto.opset not in OPSETS:
        raise UserError(
            f"{where} uses an unknown opset", quoted(proto.opset), f"known: {', '.join(OPSETS)}"
        )
    if proto.opset not in proto.block_specializations:
        raise UserError(f"{where} has no block for its opset", quoted(proto.opset), _DAMAGED)
    scope: set[str] = set()
    inputs = _define(proto.inputs, scope, where)
    block = _block(proto.block_specializations[proto.opset], scope, where, values)
    return Function(name, proto.opset, inputs, block)


def _block(proto: Any, scope: set[str], where: str, values: ValueReader) -> Block:
    """`scope` holds the names around the block; those the block adds are gone from it
    afterwards."""
    inputs = _define(proto.inputs, scope, where)
    operations = tuple(
        _operation(op, index, scope, where, values) for index, op in enumerate(proto.operations)
    )
    outputs = tuple(
        _in_scope(name, scope, f"{where}: the block's outputs") for name in proto.outputs
    )
    scope.difference_update(item.name for item in inputs)
    scope.difference_update(item.name for op in operations for item in op.outputs)
    return Block(inputs, operations, outputs)


def _operation(
    proto: Any, index: int, scope: set[str], where: str, values: ValueReader
) -> Operation:
    if not proto.type:
        raise UserError(f"{where}: operation {index} has no type", "an empty name", _DAMAGED)
    named = proto.outputs[0].name if proto.outputs else f"operation {index}"
    where = f"{where}: {quoted(proto.type)} {quoted(named)}"
    inputs = {
        key: _arguments(proto.inputs[key], scope, f"{where}: {key}", values)
        for key in sorted(proto.inputs)
    }
    attributes = {
        key: values.read(proto.attributes[key], f"{where}: {key}")
        for key in sorted(proto.attributes)
    }
    blocks = tuple(_block(block, scope, where, values) for block in proto.blocks)
    outputs = _define(proto.outputs, scope, where)
    if proto.type == "const":
        _check_const(outputs, attributes.get("val"), where)
    _check_structure(proto.type, inputs, blocks, outputs, where)
    own_name = attributes.pop("name").load() if "name" in attributes else named
    if not isinstance(own_name, str):
        raise UserError(f"{where}: the operation's name is not text", quoted(own_name), _DAMAGED)
    return Operation(proto.type, own_name, inputs, outputs, blocks, attributes)


def _arguments(
    proto: Any, scope: set[str], where: str, values: ValueReader
) -> tuple[Argument, ...]:
    arguments: list[Argument] = []
    for binding in proto.arguments:
        kind = binding.WhichOneof("binding")
        if kind is None:
            raise UserError(f"{where} is bound to nothing", "an empty argument", _DAMAGED)
        arguments.append(
            _in_scope(binding.name, scope, where)
            if kind == "name"
            else values.read(binding.value, where)
        )
    return tuple(arguments)


def _define(named: Iterable[Any], scope: set[str], where: str) -> tuple[Output, ...]:
    """Add names to `scope`. A block may not reuse a name of the blocks around it either."""
    outputs = []
    for proto in named:
        if not proto.name:
            raise UserError(f"{where} defines a value without a name", "an empty name", _DAMAGED)
        if proto.name in scope:
            raise UserError(
                f"{where} defines a value that exists already", quoted(proto.name), _DAMAGED
            )
        scope.add(proto.name)
        outputs.append(Output(proto.name, read_type(proto.type)))
    return tuple(outputs)


def _in_scope(name: str, scope: set[str], where: str) -> str:
    if name not in scope:
        raise UserError(
            f"{where} uses a value that is not defined before it", quoted(name), _DAMAGED
        )
    return name


def _check_structure(
    kind: str,
    inputs: dict[str, tuple[Argument, ...]],
    blocks: tuple[Block, ...],
    outputs: tuple[Output, ...],
    where: str,
) -> None:
    single, nested, results = _STRUCTURE.get(kind, ((), 0, None))
    if len(blocks) != nested:
        raise UserError(
            f"{where} has a wrong number of blocks", f"{len(blocks)} for {nested}", _DAMAGED
        )
    if results is not None and len(outputs) != results:
        raise UserError(
            f"{where} has a wrong number of outputs", f"{len(outputs)} for {results}", _DAMAGED
        )
    for name in single:
        if len(inputs.get(name, ())) != 1:
            raise UserError(
                f"{where}: {name} needs one argument", str(len(inputs.get(name, ()))), _DAMAGED
            )
    if kind == "while_loop" and (not inputs.get("loop_vars") or len(blocks[0].outputs) != 1):
        raise UserError(
            f"{where} lacks loop_vars or a condition",
            f"{len(blocks[0].outputs)} conditions",
            _DAMAGED,
        )


def _check_const(outputs: tuple[Output, ...], value: Constant | None, where: str) -> None:
    if value is None or len(outputs) != 1:
        raise UserError(
            f"{where} is a constant without a value", f"{len(outputs)} outputs", _DAMAGED
        )
    if value.type != outputs[0].type:
        raise UserError(
            f"{where} holds a value of another type than it declares",
            f"{describe(value.type)} for {describe(outputs[0].type)}",
            _DAMAGED,
        )
