"""Graphs of other people's models, operation by operation, whose compute plans were published.

`measured_graphs.json` has their operations, shapes and literal parameters, no weights;
`scripts/record_measured_graphs.py` writes it from packages that it converts. Equal operations are
listed once: `order` says which come, one after another.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.mlprogram.program import Argument, Constant, Program, TensorType, ValueType
from ane_moe.placement.facts import is_real
from ane_moe.placement.published.graphs import Graph, literal

GRAPHS = Path(__file__).with_name("measured_graphs.json")


def measured_graph(name: str) -> Program:
    """The program called `name`; its weights are declared, each with its own place, not there."""
    recorded = _recorded()[name]
    g = Graph(weights="fp16", converter=recorded["converter"])
    for label, (dtype, shape) in recorded["inputs"].items():
        g.input(label, tuple(shape), dtype)
    results: list[str] = []
    for index in recorded["order"]:
        entry = recorded["operations"][index]
        arguments = {key: (_argument(value, g, results),) for key, value in entry["inputs"].items()}
        dtype, shape = entry["output"]
        results.append(g._add(entry["type"], arguments, TensorType(dtype, tuple(shape)), {}))
    return g.program(results[-1])


def record(program: Program) -> dict[str, Any]:
    """The entry of `measured_graphs.json` for the default function of `program`.

    An argument is a literal, `{"back": n}` for the result of the n-th operation before,
    `{"input": name}`, or `{"stored": shape}` for an fp16 weight. Raises ValueError for what the
    file has no form of.
    """
    function = program.functions[program.default_function]
    interface = program.interfaces[program.default_function]
    operations = function.block.operations
    constants = {
        op.outputs[0].name: op.attributes["val"] for op in operations if op.type == "const"
    }
    real = [op for op in operations if is_real(op.type)]
    places = {op.outputs[0].name: index for index, op in enumerate(real)}
    names = {feature.name for feature in interface.inputs}
    distinct: dict[str, int] = {}
    order = []
    for index, op in enumerate(real):
        if (
            len(op.outputs) != 1
            or op.blocks
            or any(len(group) != 1 for group in op.inputs.values())
        ):
            raise ValueError(f"{op.type} {op.name!r} has no form in this file")
        inputs = {
            key: _recorded_argument(group[0], constants, places, names, index)
            for key, group in sorted(op.inputs.items())
        }
        line = json.dumps(
            {"type": op.type, "inputs": inputs, "output": _tensor(op.outputs[0].type)}
        )
        order.append(distinct.setdefault(line, len(distinct)))
    return {
        "converter": program.metadata["com.github.apple.coremltools.version"],
        "inputs": {feature.name: _tensor(feature.type) for feature in interface.inputs},
        "operations": [json.loads(line) for line in distinct],
        "order": order,
    }


def as_text(graphs: dict[str, dict[str, Any]]) -> str:
    """The file, an operation a line."""
    entries = []
    for name, graph in graphs.items():
        operations = ",\n".join(f"  {json.dumps(entry)}" for entry in graph["operations"])
        head = json.dumps({key: graph[key] for key in ("converter", "inputs", "order")})
        entries.append(f'"{name}": {head[:-1]}, "operations": [\n{operations}]}}')
    return "{" + ",\n".join(entries) + "}\n"


@functools.cache
def _recorded() -> dict[str, Any]:
    return json.loads(GRAPHS.read_text())


def _argument(value: Any, g: Graph, results: list[str]) -> Argument:
    if not isinstance(value, dict):
        return literal(value)
    if "back" in value:
        return results[-value["back"]]
    return value["input"] if "input" in value else g.weight(tuple(value["stored"]))


def _recorded_argument(
    value: Argument,
    constants: dict[str, Constant],
    places: dict[str, int],
    inputs: set[str],
    index: int,
) -> Any:
    if isinstance(value, str) and value in places:
        return {"back": index - places[value]}
    if isinstance(value, str) and value in inputs:
        return {"input": value}
    constant = constants[value] if isinstance(value, str) else value
    assert isinstance(constant.type, TensorType)
    if constant.blob is not None:
        if constant.type.dtype != "fp16":
            raise ValueError(f"a weight of {constant.type.dtype}")
        return {"stored": list(constant.type.shape)}
    loaded = constant.load()
    return loaded if isinstance(loaded, str) else np.asarray(loaded).tolist()


def _tensor(kind: ValueType) -> list[Any]:
    if not isinstance(kind, TensorType):
        raise ValueError(f"a value is no tensor: {kind}")
    return [kind.dtype, list(kind.shape)]
