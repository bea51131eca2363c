"""Preparing a function: names resolved to slots, constants folded, ops bound, dead values noted."""

from collections.abc import Mapping, Sequence
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
from ane_moe.runtime.reference.ops.table import Kernel, Op, OpTable
from ane_moe.runtime.reference.scope import FIRST, Expansion, Scope, Value, tensor_type
from ane_moe.runtime.reference.steps import (
    AnyTarget,
    Run,
    Slots,
    Source,
    Step,
    Steps,
    bind,
    bind_dynamic,
    target,
)
from ane_moe.runtime.reference.stored_matrix import Matrices, StoredMatrix
from ane_moe.runtime.reference.stored_rows import Whole
from ane_moe.runtime.reference.stored_source import (
    FLOATS,
    NARROW,
    key_of,
    matrix_shape,
    shape_as_matrix,
    source_of,
)
from ane_moe.runtime.reference.structural import STRUCTURAL
from ane_moe.runtime.reference.zero_gates import lean

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
    """A prepared function. `setup` fills the slots in `kept` once; `steps` run per call where each
    is observed, else those of `lean`, which give the same."""

    size: int
    inputs: dict[str, int]
    outputs: dict[str, tuple[int, ValueType]]
    setup: Steps
    steps: Steps
    lean: Steps
    kept: frozenset[int]


def prepare(
    function: Function, arith: Arithmetic, matrices: Matrices, table: OpTable = TABLE
) -> Plan:
    """Constant matrices stay as they are stored, in `matrices`, where the arithmetic takes
    them so.

    Raises UserError for an op the runtime lacks and for operations that do not fit their op.
    """
    return _Planner(function, arith, matrices, table).plan()


class _Planner:
    def __init__(self, function: Function, arith: Arithmetic, matrices: Matrices, table: OpTable):
        self.function = function
        self.matrices = matrices
        self.table = table
        self.where = f"function '{function.name}'"
        if function.opset not in IOS:
            raise UserError(
                f"{self.where} is of an unknown opset", function.opset, f"known: {', '.join(IOS)}"
            )
        self.ios = IOS[function.opset]
        self.arith = arith
        self.size = FIRST
        self.stored: dict[Value, int] = {}
        self.entered: set[Value] = set()  # inputs of fp16, which may be matrices too
        self.setup = Scope(Steps(self.where))

    def plan(self) -> Plan:
        top = Scope(Steps(self.where), self.setup)
        inputs = {}
        for given in self.function.inputs:
            value = Value(given.type)
            top.names[given.name] = value
            if not isinstance(given.type, StateType):
                inputs[given.name] = value.slot = self.new_slot()
                self.entered |= {value} if _are_narrow([value]) else set()
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
        matrices = frozenset(self.stored.values())
        quick = lean(top.steps, results, matrices, self.new_slot, self.arith.apart)
        return Plan(self.size, inputs, outputs, self.setup.steps, top.steps, quick, read & made)

    def new_slot(self) -> int:
        self.size += 1
        return self.size - 1

    # ---- values -> slots

    def slot(self, value: Value) -> int:
        """The slot of `value`; a constant is loaded into one at set-up when first asked for."""
        if value.slot is None and value.expansion is not None:
            self.expand(value.expansion)
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

    def expand(self, expansion: Expansion) -> None:
        """Expand a compressed weight at set-up."""
        sources: list[Source] = [
            None if value is None else self.taken(value, expansion.op, self.setup)
            for value in expansion.given
        ]
        for value in expansion.results:
            value.slot = self.new_slot()
        targets = [
            target(self.slot(value), value.type, expansion.op.half == "widen")
            for value in expansion.results
        ]
        reads = {source for source in sources if isinstance(source, int)}
        run = bind(expansion.kernel, sources, targets)
        writes = [value.slot for value in expansion.results]
        self.add(self.setup, expansion.op.name, expansion.name, run, reads, writes)

    def matrix_slot(self, value: Value, shape: tuple[int, int]) -> int:
        """The slot of a constant matrix `(O, I)` as it is stored."""
        if value not in self.stored:
            slot = self.stored[value] = self.new_slot()
            dtype = torch_dtype(tensor_type(value, value.name).dtype)

            def load(slots: Slots) -> None:
                slots[slot] = self.matrices.find(
                    key_of(value), shape, lambda: source_of(value, shape), dtype
                )

            self.add(self.setup, "const", value.name, load, (), (slot,))
        return self.stored[value]

    def given_slot(self, value: Value, shape: tuple[int, int], scope: Scope) -> int:
        """The slot of a matrix `(O, I)` that is an input: taken as a constant one is, so that both
        give the same."""
        narrow, slot = self.slot(value), self.new_slot()
        memory = self.matrices.memory

        def run(slots: Slots) -> None:
            source = Whole(slots[narrow].view(shape))
            slots[slot] = StoredMatrix(shape, source, memory, torch.float16)

        self.add(scope, "matrix", "", run, (narrow,), (slot,), sources=(narrow,))
        return slot

    def wide_slot(self, value: Value, scope: Scope) -> int:
        """The slot of `value` as fp32: its own unless it is of a narrower float type."""
        if not isinstance(value.type, TensorType) or value.type.dtype not in ("fp16", "bf16"):
            return self.slot(value)
        found = scope.find_wide(value)
        if found is None:
            home = self.setup if value.fixed else scope
            narrow, found = self.slot(value), self.new_slot()
            home.wide[value] = found
            run = _widener(narrow, found)
            self.add(home, "widen", "", run, (narrow,), (found,), sources=(narrow,))
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
        sources: Sequence[Source] = (),
        targets: Sequence[AnyTarget] = (),
    ) -> None:
        scope.steps.steps.append(
            Step(
                op,
                name,
                run,
                frozenset(reads),
                frozenset(writes),
                shown,
                sources=tuple(sources),
                targets=tuple(targets),
            )
        )

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
        if fixed and op.name.startswith("constexpr_"):
            return self.constexpr(op, operation, arguments, scope)
        home = self.setup if fixed and scope.outer is self.setup else scope
        results = [
            Value(output.type, self.new_slot(), fixed=home is self.setup)
            for output in operation.outputs
        ]
        run, reads, sources, targets = self.bind(op, operation.name, arguments, results, home)
        for output, value in zip(operation.outputs, results, strict=True):
            scope.names[output.name] = value
        writes = [self.slot(value) for value in results]
        named = zip(operation.outputs, writes, strict=True)
        shown = tuple(
            (output.name, slot) for output, slot in named if isinstance(output.type, TensorType)
        )
        self.add(home, operation.type, operation.name, run, reads, writes, shown, sources, targets)

    def constexpr(
        self, op: Op, operation: Operation, arguments: Mapping[str, list[Value]], scope: Scope
    ) -> None:
        """Note how a compressed weight is expanded, for when a value is asked for."""
        specs = {spec.rstrip("?"): spec for spec in op.tensors.split()}
        others = {name: values for name, values in arguments.items() if name not in specs}
        parameters, computed = self.parameters(op, others)
        if computed:
            raise UserError("a parameter that has to be constant is computed", ", ".join(computed))
        given = tuple(only(spec, arguments.get(name, [])) for name, spec in specs.items())
        kernel = make_kernel(op, parameters)
        results = tuple(
            Value(output.type, fixed=True, name=operation.name) for output in operation.outputs
        )
        expansion = Expansion(op, operation.name, self.where, parameters, kernel, given, results)
        for output, result in zip(operation.outputs, results, strict=True):
            result.expansion = expansion
            scope.names[output.name] = result

    def bind(
        self,
        op: Op,
        called: str,
        arguments: Mapping[str, list[Value]],
        results: list[Value],
        scope: Scope,
    ) -> tuple[Run, set[int], list[Source], list[AnyTarget]]:
        """The closure of one operation, the slots it reads, and what its kernel takes and gives."""
        specs = {spec.rstrip("?*"): spec for spec in op.tensors.split()}
        kinds = {
            tensor_type(value, name).dtype
            for name in op.alike.split()
            for value in arguments.get(name, [])
        }
        if len(kinds) > 1:
            raise UserError("its inputs are of different element types", ", ".join(sorted(kinds)))
        fixed, dynamic = self.parameters(op, {k: v for k, v in arguments.items() if k not in specs})
        types = [value.type for value in results]
        if "out" in op.parameters:
            fixed["out"] = types
        if "arith" in op.parameters:
            fixed["arith"] = self.arith.at(op.name, called)
        missing = op.required - fixed.keys() - dynamic.keys()
        if missing:
            raise UserError("a required input is missing", ", ".join(sorted(missing)))
        tensors = {name: arguments.get(name, []) for name in specs}
        matrix = None if dynamic else self.matrix_input(op, fixed, types, tensors)
        given = [value for values in tensors.values() for value in values]
        # A product and nothing more: its kernel takes fp16 as it is.
        product = matrix is not None and len(given) == 2 and _are_narrow([*given, *results])
        sources = [
            self.source(spec, tensors[name], op, scope, name == matrix, product)
            for name, spec in specs.items()
        ]
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
            run = bind_dynamic(op.make, fixed, dynamic, sources, targets)
            return run, reads | set(dynamic.values()), sources, targets
        return bind(make_kernel(op, fixed), sources, targets), reads, sources, targets

    def matrix_input(
        self,
        op: Op,
        parameters: Mapping[str, Any],
        types: list[ValueType],
        tensors: Mapping[str, list[Value]],
    ) -> str | None:
        """The input that the op takes as a matrix as it is stored, if there is one."""
        if op.matrix is None or not self.arith.as_stored:
            return None
        name, takes = op.matrix
        floats = all(isinstance(kind, TensorType) and kind.dtype in FLOATS for kind in types)
        stored = any(self.shape_of(value, op) for value in tensors[name])
        return name if floats and stored and takes(**parameters) else None

    def shape_of(self, value: Value, op: Op) -> tuple[int, int] | None:
        """(O, I) of a matrix that an op takes as such: a constant, or an input."""
        if value in self.entered:
            return shape_as_matrix(value, op.matrix_rank)
        return matrix_shape(value, op.matrix_rank)

    def source(
        self, spec: str, values: list[Value], op: Op, scope: Scope, as_stored: bool, product: bool
    ) -> Source:
        if spec.endswith("*") and values:
            return tuple(self.taken(value, op, scope) for value in values)
        value = only(spec, values)
        if value is None:
            return None
        shape = self.shape_of(value, op) if as_stored else None
        if shape is not None and value in self.entered:
            return self.given_slot(value, shape, scope)
        if shape is not None:
            return self.matrix_slot(value, shape)
        return self.slot(value) if product else self.taken(value, op, scope)

    def taken(self, value: Value, op: Op, scope: Scope) -> int:
        """The slot of a value in the form that the op's kernel takes."""
        return self.wide_slot(value, scope) if op.half == "widen" else self.slot(value)

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


def _are_narrow(values: Sequence[Value]) -> bool:
    """Whether all of them are of fp16."""
    kinds = [value.type for value in values]
    return all(isinstance(kind, TensorType) and kind.dtype == NARROW for kind in kinds)


def only(spec: str, values: list[Value]) -> Value | None:
    """The one value of an input; None of one that may be absent and is."""
    if not values:
        if spec.endswith("?"):
            return None
        raise UserError("a required input is missing", spec.rstrip("*"))
    if len(values) > 1:
        raise UserError(f"input '{spec.rstrip('?')}' takes one value", str(len(values)))
    return values[0]


def make_kernel(op: Op, parameters: dict[str, Any]) -> Kernel:
    """The kernel of an op all of whose parameters are constant."""
    missing = op.required - parameters.keys()
    if missing:
        raise UserError("a required input is missing", ", ".join(sorted(missing)))
    try:
        return op.make(**parameters)
    except Exception as error:  # whatever an untrusted program's parameters can cause
        raise UserError("its parameters do not fit", f"{type(error).__name__}: {error}") from error


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
