"""A function of an ML Program as a Core AI asset: its operations, one by one, written again.

The twin computes what the package says and nothing of how it came about: weights are those that it
stores, compressed ones expanded to fp16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Argument, Constant, Feature, Operation, Program, TensorType
from ane_moe.runtime.coreai.installed import core_ai, quiet
from ane_moe.runtime.coreai.names import mark_values, write_names
from ane_moe.runtime.coreai.operations import OPERATIONS
from ane_moe.runtime.interface import NotExecuted
from ane_moe.runtime.reference.dtypes import torch_dtype
from ane_moe.runtime.reference.weight_values import weight_values

# Operations that the twin gives a meaning to where it stands.
STRUCTURE = ("const", "read_state", "write_state", "reshape")
Value = Tensor | np.ndarray | str | tuple
MAIN = "main"  # the function of an asset that is a twin


class Step(nn.Module):
    """An operation as a module of its own, by whose path what is exported tells its parts."""

    def __init__(self, op: Operation):
        super().__init__()
        self._op = op

    def forward(self, values: Mapping[str, Any]) -> Any:
        op = self._op
        if op.type == "reshape":
            declared = op.outputs[0].type
            assert isinstance(declared, TensorType)
            return values[_name(op, "x")].reshape(declared.shape)
        return _computed(op, values)


class Twin(nn.Module):
    """A function as a torch module: called with its inputs in order, it gives its outputs; its
    states are buffers that it writes in the end."""

    def __init__(self, program: Program, function: str):
        """Raises UserError for an operation that it lacks."""
        super().__init__()
        self.name, self._function = function, program.functions[function]
        self.interface = program.interfaces[function]
        lacking = {op.type for op in self._function.block.operations if not _is_known(op)}
        if lacking:
            raise NotExecuted(
                f"function '{function}' of {program.path} has operations that Core AI's twin lacks",
                ", ".join(sorted(lacking)),
                "the reference runtime executes them",
            )
        self.steps = nn.ModuleList(map(Step, self._function.block.operations))
        self._constants: dict[str, Value] = {}
        for name, value in weight_values(self._function, lambda _: True):
            self._keep(name, torch.from_numpy(np.array(value)))
        for op in self._function.block.operations:
            if op.type == "const" and op.outputs[0].name not in self._constants:
                self._keep(op.outputs[0].name, _literal(op.attributes["val"]))
        self.states = {f"state_{n}": one for n, one in enumerate(self.interface.states)}
        for buffer, state in self.states.items():
            self.register_buffer(buffer, torch.zeros(*_shape(state), dtype=_dtype(state)))

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs of the declared types: zeros."""
        features = self.interface.inputs
        return tuple(torch.zeros(*_shape(one), dtype=_dtype(one)) for one in features)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Without a branch that depends on a value: torch.export sees all of it."""
        kept = {state.name: getattr(self, buffer) for buffer, state in self.states.items()}
        features = zip(self.interface.inputs, inputs, strict=True)
        values: dict[str, Any] = dict(self._constants)
        values |= {feature.name: value for feature, value in features}
        for op, step in zip(self._function.block.operations, self.steps, strict=True):
            if op.type == "read_state":
                values[op.outputs[0].name] = kept[_name(op, "input")]
            elif op.type == "write_state":
                kept[_name(op, "input")] = values[_name(op, "data")]
            elif op.outputs and (op.type in OPERATIONS or op.type == "reshape"):
                results = step(values)
                several = results if isinstance(results, tuple) else (results,)
                names = (output.name for output in op.outputs)
                values |= zip(names, several, strict=True)
        for buffer, state in self.states.items():
            getattr(self, buffer).copy_(kept[state.name])
        outputs = (values[name] for name in self._function.block.outputs)
        # A copy: an output that is an input, or a weight, is not one of Core AI's.
        return tuple(value.clone() for value in outputs)

    def _keep(self, name: str, value: Value) -> None:
        if isinstance(value, Tensor):
            self.register_buffer(f"constant_{len(self._constants)}", value)
        self._constants[name] = value


def _is_known(op: Operation) -> bool:
    return op.type in OPERATIONS or op.type in STRUCTURE or op.type.startswith("constexpr_")


def _literal(constant: Constant) -> Value:
    """Real numbers as a tensor; what shapes an operation as it is."""
    value = constant.load()
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value))
    return value


def _computed(op: Operation, values: Mapping[str, Any]) -> Any:
    def value(argument: Argument) -> Any:
        return values[argument] if isinstance(argument, str) else _literal(argument)

    given = {
        name: [value(each) for each in arguments] if name == "values" else value(arguments[0])
        for name, arguments in op.inputs.items()
    }
    return OPERATIONS[op.type](**given)


def _name(op: Operation, argument: str) -> str:
    name = op.inputs[argument][0]
    assert isinstance(name, str)
    return name


def _shape(feature: Feature) -> tuple[int, ...]:
    if any(size is None for size in feature.type.shape):
        raise UserError(
            f"'{feature.name}' has no fixed shape", do="Core AI's twin is of fixed shapes alone"
        )
    return tuple(size or 0 for size in feature.type.shape)


def _dtype(feature: Feature) -> torch.dtype:
    return torch_dtype(feature.type.dtype)


def save_twin(program: Program, function: str, path: Path) -> None:
    """Write the twin of a function as `path`, an `.aimodel` with one function, `main`.

    Raises UserError where Core AI is not installed, and NotExecuted where the function has an
    operation that the twin or Core AI's converter lacks.
    """
    module = converted({MAIN: (program, function)})
    with quiet():
        module.save_asset(path)


def converted(functions: Mapping[str, tuple[Program, str]]) -> Any:
    """The twins of functions as one program of Core AI's (an AIProgram), each an entry point of the
    name that it is given.

    Raises as `save_twin` does.
    """
    tools = core_ai("coreai_torch")
    converter = tools.TorchConverter(mode=tools.TorchConverter.Mode.DEBUG)  # tells of nodes
    with torch.no_grad(), quiet():
        for name, (program, function) in functions.items():
            try:
                _add(converter, tools, name, Twin(program, function).eval())
            except (RuntimeError, ValueError, NotImplementedError) as error:  # of torch or Apple
                raise _refused(program, function, error) from None
        try:
            made = converter.to_coreai()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise _refused(program, ", ".join(functions), error) from None
    blocks = {name: owner.functions[own].block for name, (owner, own) in functions.items()}
    write_names(mlir_module(made), {name: block.operations for name, block in blocks.items()})
    return made


def mlir_module(program: Any) -> Any:
    """The module inside a program of Core AI's."""
    return program._module._mlir_module


def _refused(program: Program, functions: str, error: Exception) -> NotExecuted:
    found = str(error).strip().split("\n")[0]
    return NotExecuted(
        f"Core AI's converter refuses function '{functions}' of {program.path}", found
    )


def _add(converter: Any, tools: Any, name: str, twin: Twin) -> None:
    """Stage a twin as the entry point `name`."""
    exported = torch.export.export(twin, twin.examples())
    exported = exported.run_decompositions(tools.get_decomp_table())
    mark_values(exported.graph)
    written = list(exported.graph_signature.buffers_to_mutate.values())
    if unwritten := twin.states.keys() - set(written):
        names = ", ".join(sorted(twin.states[buffer].name for buffer in unwritten))
        raise NotExecuted(f"function '{twin.name}' reads a state and never writes it", names)
    converter.add_exported_program(
        exported,
        entrypoint_name=name,
        input_names=[feature.name for feature in twin.interface.inputs],
        output_names=[feature.name for feature in twin.interface.outputs],
        state_names=[twin.states[buffer].name for buffer in written],
    )
