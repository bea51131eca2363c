"""What the operations of an asset are called.

Each operation of an asset whose value is that of an operation of the ML Program behind it says so
in its location: `mul x_cast_fp16` in the place of a file's name, and as its line which one of the
program it is, from 1. Where several became one, the last is named. Nothing else is kept of the
locations that Apple's converter writes, which are those of Python files on this machine.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ane_moe.mlprogram.program import Operation
from ane_moe.runtime.coreai.installed import core_ai

# Operations whose numbers are those of their input: they may go without a trace.
MOVES = ("cast", "identity", "reshape", "transpose", "write_state")
CONSTANT = "coreai.constant"
STEPS = "steps"  # the attribute of a module that has a submodule for each operation
# Files that stand for the program while it is converted: of nodes that give an operation's value,
# and of those that are steps on the way to it.
VALUE, STEP = "value", "step"
PLACE = re.compile(rf'"({VALUE}|{STEP})":(\d+):')
# What gives its input's numbers in the same order.
SAME_NUMBERS = ("aten.view.default", "aten._unsafe_view.default", "aten.clone.default")


@dataclass(frozen=True, order=True)
class OperationName:
    """One operation of an ML Program: which one it is, its type, and the name of its output."""

    line: int
    type: str
    output: str

    @property
    def file(self) -> str:
        return f"{self.type} {self.output}"


def mark_values(graph: Any) -> None:
    """Have each node of an exported module of STEPS point at the operation that it is part of, and
    at nothing else."""
    last = {}
    for node in graph.nodes:
        last[_line(node)] = node
        _point(node, STEP)
    for line, node in last.items():
        while line is not None and line == _line(node):
            _point(node, VALUE)
            if str(node.target) not in SAME_NUMBERS:
                break
            node = node.args[0]


def _point(node: Any, file: str) -> None:
    line = _line(node)
    node.meta["stack_trace"] = f'  File "{file}", line {line}, in forward' if line else ""


def _line(node: Any) -> int | None:
    """The line of the operation that a node is part of."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    places = [path.removeprefix(f"{STEPS}.") for path in paths if path.startswith(f"{STEPS}.")]
    return int(places[0]) + 1 if places else None


def write_names(module: Any, functions: Mapping[str, Sequence[Operation]]) -> None:
    """Turn the marks in the locations of a converted module into names; `functions` are the
    operations of each by its name."""
    ir = core_ai("coreai._compiler.ir")
    debug = core_ai("coreai._compiler.dialects.debuginfo.attrs")
    bindings = core_ai("coreai._compiler._mlir_libs._coreaiIR._bindings.mlir")
    context = module.context
    nowhere, scope = ir.Location.unknown(context), ir.UnitAttr.get(context=context)
    bindings.set_op_location(module.operation, nowhere)
    for graph in module.body.operations:
        operations = functions[ir.StringAttr(graph.attributes["sym_name"]).value]
        named = _named(graph.operation, operations)
        for op in _within(graph.operation):
            bindings.set_op_location(op, nowhere)
            for argument in (each for block in _blocks(op) for each in block.arguments):
                bindings.set_block_arg_location(argument, nowhere)
        for name, op in named:
            source = ir.Location.file(name.file, name.line, 0, context=context)
            location = debug.location_attr(src=source, scope=scope, context=context)
            bindings.set_op_location(op, location)


def _named(graph: Any, operations: Sequence[Operation]) -> list[tuple[OperationName, Any]]:
    """Names, and which of Core AI's operations in a graph they are of.

    What takes a value and left no trace may have been folded into that value's own operation, a
    factor into a weight: then it has no name.
    """
    last, traced = {}, set()  # an operation of several ends with its value
    for op in _within(graph):
        marks = _marks(op) if op.name != CONSTANT else []
        traced |= {line for line, _ in marks}
        line, is_value = max(marks, default=(0, False))  # of several that became one the last
        if is_value and len(operations[line - 1].outputs) == 1:
            last[line] = op
    folded = {
        argument
        for line, op in enumerate(operations, 1)
        if line not in traced and op.type not in MOVES
        for argument in chain.from_iterable(op.inputs.values())
    }
    names = {line: operations[line - 1].outputs[0].name for line in last}
    return [
        (OperationName(line, operations[line - 1].type, names[line]), op)
        for line, op in last.items()
        if names[line] not in folded
    ]


def _marks(op: Any) -> list[tuple[int, bool]]:
    """Lines that an operation points at, and whether it has the value or is a step towards it."""
    found = PLACE.findall(str(op.location))
    return [(int(line), file == VALUE) for file, line in found]


def _within(op: Any) -> Iterator[Any]:
    yield op
    for block in _blocks(op):
        for inner in block.operations:
            yield from _within(inner.operation)


def _blocks(op: Any) -> Iterator[Any]:
    return (block for region in op.regions for block in region.blocks)


def read_names(debug_infos: bytes) -> dict[int, OperationName]:
    """The names of what Core AI made of a model's operations, by its own numbers for them. Of a
    model without names none. Raises errors of Python's where the form is another."""
    named = {}
    for record in json.loads(debug_infos):
        for made in record["operations"]:
            found = [_name(place) for place in made["sourceLocations"]]
            if any(found):
                named[made["odixId"]] = max(filter(None, found))
    return named


def _name(place: Mapping[str, Any]) -> OperationName | None:
    kind, _, output = place["fileName"].partition(" ")
    is_ours = kind.isidentifier() and output  # others have paths there
    return OperationName(place["line"], kind, output) if is_ours else None
