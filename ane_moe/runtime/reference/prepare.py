"""Preparing a function: names resolved to slots, constants folded, ops bound, dead values noted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    Constant,
    DictionaryType,
    Function,
    Operation,
    StateType,
    TensorType,
    ValueType,
)
from ane_moe.runtime.reference.dtypes import to_torch, torch_dtype
from ane_moe.runtime.reference.op_error import OpError
from ane_moe.runtime.reference.ops import TABLE
from ane_moe.runtime.reference.ops.arithmetic import Arithmetic
from ane_moe.runtime.reference.ops.table import Op, OpTable
from ane_moe.runtime.reference.scope import FIRST, Scope, Value, tensor_type
from ane_moe.runtime.reference.steps import (
    Run,
    Slots,
    Source,
    Step,
    Steps,
    bind,
    bind_dynamic,
    target,
)
from ane_moe.runtime.reference.structural import STRUCTURAL

IOS = {"CoreML5": 15, "CoreML6": 16, "CoreML7": 17, "CoreML8": 18, "CoreML9": 26}
# The most of a constant that is a parameter (a shape, an axis, a mask), not data.
MAX_PARAMETER_BYTES = 1 << 20
SHAPING = frozenset(
    {  # floats that make a shape, and are not computed with
        "scale_factor_height",
        "scale_factor_width",
        "start",
        "end",
        "step",
    }
)


@dataclass
class Plan:
    """A prepared function. `setup` fills the slots in `kept` once; `steps` run per call."""

    size: int
    inputs: dict[str, int]
    outputs: dict[str, tuple[int, ValueType]]
    setup: Steps
    steps: Steps
    kept: frozenset[int]


def prepare(function: Function, arith: Arithmetic, table: OpTable = TABLE) -> Plan:
    """Raises UserError for an op the runtime lacks and for operations that do not fit their op."""
    return _Planner(function, arith, table).plan()


class _Planner:
    def __init__(self, function: Function, arith: Arithmetic, table: OpTable):
        self.function = function
        self.table = table
        self.where = f"function '{function.name}'"
        if function.opset not in IOS:
            raise UserError(
                f"{self.where} is of an unknown opset", function.opset, f"known: {', '.join(IOS)}"
            )
        self.ios = IOS[function.opset]
        self.arith = arith
        self.size = FIRST
        self.setup = Scope(Steps(self.where))

    def plan(self) -> Plan:
        top = Scope(Steps(self.where), self.setup)
        inputs = {}
        for given in self.function.inputs:
            value = Value(given.type)
            top.names[given.name] = value
            if not isinstance(given.type, StateType):
                inputs[given.name] = value.slot = self.new_slot()
        self.operations(self.function.block, top)
        outputs: dict[str, tuple[int, ValueType]] = {}
        for name in self.function.block.outputs:
            value = top.find(name)
            if not isinstance(value.type, DictionaryType):
                tensor_type(value, name)
            outputs[name] = (self.slot(value), value.type)
        results = frozenset(slot for slot, _ in outputs.values())
        top.steps.free_dead(results)
        read = frozenset(slot for step in top.steps.steps for slot in step.reads) | results
        made = frozenset(slot for step in self.setup.steps.steps for slot in step.writes)
        self.setup.steps.free_dead(read & made)
        return Plan(self.size, inputs, outputs, self.setup.steps, top.steps, read & made)

    def new_slot(self) -> int:
        self.size += 1
        return self.size - 1

    # ---- values -> slots

    def slot(self, value: Value) -> int:
        """The slot of `value`; a constant is loaded into one at set-up when first asked for."""
        if value.slot is None:
            if value.constant is None or not isinstance(value.type, TensorType):
                raise UserError(
                    f"{self.where} uses a value that is not a tensor where a tensor belongs",
                    type(value.type).__name__,
                )
            value.slot = self.new_slot()
            load = _loader(value.constant, value.type, value.slot)
            self.add(self.setup, "const", value.name, load, (), (value.slot,))
        return value.slot

    def wide_slot(self, value: Value, scope: Scope) -> int:
        """The slot of `value` as fp32: its own unless it is of a narrower float type."""
        if not isinstance(value.type, TensorType) or value.type.dtype not in ("fp16", "bf16"):
            return self.slot(value)
        found = scope.find_wide(value)
        if found is None:
            home = self.setup if value.fixed else scope
            narrow, found = self.slot(value), self.new_slot()
            home.wide[value] = found
            self.add(home, "widen", "", _widener(narrow, found), (narrow,), (found,))
        return found

    def add(
        self,
        scope: Scope,
        op: str,
        name: str,
        run: Run,
        reads: Any,
        writes: Any,
        shown: tuple[tuple[str, int], ...] = (),
    ) -> None:
        scope.steps.steps.append(Step(op, name, run, frozenset(reads), frozenset(writes), shown))

    def argument(self, argument: Argument, scope: Scope) -> Value:
        if isinstance(argument, str):
            return scope.find(argument)
        return Value(argument.type, constant=argument, fixed=True)

    # ---- operations

    def operations(self, block: Block, scope: Scope) -> None:
        for operation in block.operations:
            self.operation(operation, scope)

    def operation(self, operation: Operation, scope: Scope) -> None:
        special = STRUCTURAL.get(operation.type)
        try:
            if special is not None:
                special(self, operation, scope)
            else:
                self.tensor_op(operation, scope)
        except OpError:
            raise
        except UserError as error:
            raise OpError(operation.type, operation.name, self.where, error) from None

    def tensor_op(self, operation: Operation, scope: Scope) -> None:
        op = self.table.find(operation.type, self.ios)
        if op is None:
            raise UserError(
                "the reference runtime does not execute this op",
                f"no op of this name in the iOS{self.ios} opset",
            )
        given: dict[str, tuple[Argument, ...]] = {
            **operation.inputs,
            **{name: (value,) for name, value in operation.attributes.items() if name != "name"},
        }
        arguments = {
            name: [self.argument(one, scope) for one in bound]
            for name, bound in given.items()
            if bound
        }
        given_values = [value for values in arguments.values() for value in values]
        fixed = not op.varies and all(value.fixed for value in given_values)
        home = (
            self.setup
            if fixed and (scope.outer is self.setup or op.name.startswith("constexpr_"))
            else scope
        )
        results = [
            Value(output.type, self.new_slot(), fixed=home is self.setup)
            for output in operation.outputs
        ]
        run, reads = self.bind(op, operation.name, arguments, results, home)
        for output, value in zip(operation.outputs, results, strict=True):
            scope.names[output.name] = value
        writes = [self.slot(value) for value in results]
        named = zip(operation.outputs, writes, strict=True)
        shown = tuple(
            (output.name, slot) for output, slot in named if isinstance(output.type, TensorType)
        )
        self.add(home, operation.type, operation.name, run, reads, writes, shown)

    def bind(
        self,
        op: Op,
        called: str,
        arguments: Mapping[str, list[Value]],
        results: list[Value],
        scope: Scope,
    ) -> tuple[Run, set[int]]:
        """The closure of one operation and the slots it reads."""
        sources: list[Source] = []
        names = set()
        for spec in op.tensors.split():
            name = spec.rstrip("?*")
            names.add(name)
            sources.append(self.source(spec, arguments.get(name, []), op, scope))
        kinds = {
            tensor_type(value, name).dtype
            for name in op.alike.split()
            for value in arguments.get(name, [])
        }
        if len(kinds) > 1:
            raise UserError("its inputs are of different element types", ", ".join(sorted(kinds)))
        fixed, dynamic = self.parameters(op, {k: v for k, v in arguments.items() if k not in names})
        types = [value.type for value in results]
        if "arith" in op.parameters:
            fixed["arith"] = self.arith.at(op.name, called)
        if "out" in op.parameters:
            fixed["out"] = types
        missing = op.required - fixed.keys() - dynamic.keys()
        if missing:
            raise UserError("a required input is missing", ", ".join(sorted(missing)))
        targets = [
            target(self.slot(value), declared, op.half == "widen")
            for value, declared in zip(results, types, strict=True)
        ]
        reads = {
            slot
            for source in sources
            if source is not None
            for slot in ((source,) if isinstance(source, int) else source)
        }
        if dynamic:
            return bind_dynamic(op.make, fixed, dynamic, sources, targets), reads | set(
                dynamic.values()
            )
        try:
            kernel = op.make(**fixed)
        except Exception as error:  # whatever an untrusted program's parameters can cause
            raise UserError(
                "its parameters do not fit", f"{type(error).__name__}: {error}"
            ) from error
        return bind(kernel, sources, targets), reads

    def source(self, spec: str, values: list[Value], op: Op, scope: Scope) -> Source:
        if not values:
            if spec.endswith("?"):
                return None
            raise UserError("a required input is missing", spec.rstrip("*"))
        slots = tuple(
            self.wide_slot(value, scope) if op.half == "widen" else self.slot(value)
            for value in values
        )
        if spec.endswith("*"):
            return slots
        if len(slots) > 1:
            raise UserError(f"input '{spec.rstrip('?')}' takes one value", str(len(slots)))
        return slots[0]

    def parameters(
        self, op: Op, arguments: Mapping[str, list[Value]]
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Constant parameters as Python values, and the slots of computed ones."""
        fixed: dict[str, Any] = {}
        dynamic: dict[str, int] = {}
        for name, values in arguments.items():
            if name not in op.parameters:
                raise UserError("it has an input that the op does not take", name)
            if len(values) > 1:
                fixed[name] = [_as_python(value) for value in values]
            elif values[0].constant is not None:
                fixed[name] = _as_python(values[0])
            else:
                dynamic[name] = self.slot(values[0])
        absent = {name: value for name, value in op.defaults.items() if name not in arguments}
        for name, value in (fixed | absent).items():
            if isinstance(value, float) and name not in SHAPING:
                fixed[name] = self.arith.parameter(value)
        return fixed, dynamic


def _loader(constant: Constant, declared: TensorType, slot: int) -> Run:
    def run(slots: Slots) -> None:
        slots[slot] = to_torch(np.asarray(constant.load()), declared.dtype)

    torch_dtype(declared.dtype)  # a string has no slot: said when the function is prepared
    return run


def _widener(narrow: int, wide: int) -> Run:
    def run(slots: Slots) -> None:
        slots[wide] = slots[narrow].to(torch.float32)

    return run


def _as_python(value: Value) -> Any:
    """A parameter as bool, int, float, str or (nested) list of them."""
    constant = value.constant
    if constant is None:
        raise UserError("a parameter that has to be constant is computed")
    if constant.nbytes > MAX_PARAMETER_BYTES:
        raise UserError("a parameter is far too large", f"{constant.nbytes} bytes")
    loaded = constant.load()
    return loaded.tolist() if isinstance(loaded, np.ndarray | np.generic) else loaded
