"""The reference runtime: executes ML Programs with torch on the CPU.

Every op computes in fp32 and rounds its result to the declared type once; with `precision="fp16"`
partial sums and intermediates inside ops are rounded too, with `precision="engine"` the Neural
Engine's published arithmetic is computed (`engine/`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.pipeline import OpenPipeline, open_model
from ane_moe.mlprogram.program import Feature, Program, TensorType, ValueType, sizes
from ane_moe.mlprogram.reader import OpenProgram
from ane_moe.mlprogram.weights import weights_of
from ane_moe.runtime.inputs import check_inputs, default_value
from ane_moe.runtime.interface import Intermediate, Observer
from ane_moe.runtime.memory import Memory, weight_memory
from ane_moe.runtime.reference.dtypes import to_numpy, torch_dtype
from ane_moe.runtime.reference.engine.arithmetic import Engine
from ane_moe.runtime.reference.engine.ledger import Ledger, Site
from ane_moe.runtime.reference.engine.ops import ENGINE_TABLE
from ane_moe.runtime.reference.lists import TensorList
from ane_moe.runtime.reference.ops import TABLE
from ane_moe.runtime.reference.ops.arithmetic import Arithmetic, Exact, Narrow
from ane_moe.runtime.reference.ops.table import OpTable
from ane_moe.runtime.reference.pipeline import ReferencePipeline
from ane_moe.runtime.reference.prepare import Plan, prepare
from ane_moe.runtime.reference.scope import FOREIGN, STATES
from ane_moe.runtime.reference.stored_matrix import Matrices, StoredMatrix

Precision = Literal["fp32", "fp16", "engine"]
PRECISIONS = get_args(Precision)

# What a slot holds from call to call.
Weight = Tensor | TensorList | StoredMatrix | None


@dataclass
class State:
    """The tensors of a stateful model, by name."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """A copy of one state's contents."""
        if name not in self.tensors:
            raise UserError(
                "no state of this name", found=name, do=f"known: {', '.join(self.tensors)}"
            )
        return self.tensors[name].clone().numpy()


class ReferenceFunction:
    """One function of a package, prepared. Weights are read by `load_weights` or the first call,
    and kept until `drop_weights`."""

    in_part = False

    def __init__(
        self,
        program: Program,
        function: str,
        precision: Precision = "fp32",
        matrices: Matrices | None = None,
        ledger: Ledger | None = None,
        package: str = "",
    ):
        """`matrices` are those of the package, where its functions share them."""
        arith, table = _arithmetic(precision, ledger, Site(package, function, "", ""))
        shared = matrices or Matrices(weight_memory(None, 0))
        self.name = function
        self.program = program
        interface = program.interfaces[function]
        self.inputs, self.outputs, self.states = (
            interface.inputs,
            interface.outputs,
            interface.states,
        )
        self._plan: Plan = prepare(program.functions[function], arith, shared, table)
        self._weights: list[Weight] | None = None
        self._own: frozenset[int] = frozenset()

    def make_state(self) -> State:
        return State(
            {
                s.name: torch.zeros(_fixed_shape(s), dtype=torch_dtype(s.type.dtype))
                for s in self.states
            }
        )

    def predict(
        self, inputs: Mapping[str, np.ndarray], state: State | None = None
    ) -> dict[str, Any]:
        """Run once. Floats are cast to the declared float type, as Core ML does; NaN and Inf may
        enter.

        Gives arrays; of a classifier also the likeliest label (str or int) and a dict of the
        probabilities by label.
        Raises UserError for inputs or a state that do not fit, and for an op whose result is not
        what is declared.
        """
        with torch.inference_mode():  # torch keeps no account of what it computes
            slots = self._slots(inputs, state)
            self._plan.lean.execute(slots)
            return self._results(slots)

    def intermediates(self) -> tuple[Intermediate, ...]:
        """What `observe` shows, with the shapes that the program declares."""
        operations = self.program.functions[self.name].block.operations
        types = {output.name: output.type for one in operations for output in one.outputs}
        shown = [(step.op, name) for step in self._plan.steps.steps for name, _ in step.shown]
        return tuple(Intermediate(op, name, _shape(types.get(name))) for op, name in shown)

    def observe(
        self, inputs: Mapping[str, np.ndarray], observer: Observer, state: State | None = None
    ) -> dict[str, Any]:
        """As `predict`, showing `observer` the outputs of each op, in order; none is left out.

        What a cond or while_loop computes inside is not shown, nor are lists, labels, constants and
        what is computed from constants alone.
        """
        slots = self._slots(inputs, state)
        self._plan.steps.execute(
            slots,
            lambda step: observer(
                step.op,
                step.name,
                {
                    name: slots[slot].float().numpy()
                    if slots[slot].dtype is torch.bfloat16
                    else slots[slot].numpy()
                    for name, slot in step.shown
                },
            ),
        )
        return self._results(slots)

    def load_weights(self) -> None:
        """Read the weights now, and expand what there is memory for. Raises UserError where the
        package is damaged."""
        for matrix in self._matrices():
            matrix.keep()

    def drop_weights(self) -> None:
        """Free the expanded weights; the next call reads them again."""
        self._weights = None

    @property
    def held_bytes(self) -> int:
        """Memory that its weights take now, beside the file's own pages."""
        others = sum(tensor.nbytes for value in self._weights or () for tensor in _tensors(value))
        matrices = self._matrices() if self._weights else []
        return others + sum(matrix.kept_bytes for matrix in matrices)

    def _matrices(self) -> list[StoredMatrix]:
        return [value for value in self._loaded() if isinstance(value, StoredMatrix)]

    def _loaded(self) -> list[Weight]:
        if self._weights is None:
            self._weights = self._load_weights()
        return self._weights

    def _slots(self, inputs: Mapping[str, np.ndarray], state: State | None) -> list:
        given = self._tensors(inputs)
        tensors = self._check_state(state)
        slots: list = self._loaded().copy()
        for name, slot in self._plan.inputs.items():
            slots[slot] = given[name]
        slots[STATES] = tensors
        slots[FOREIGN] = self._own | {
            tensor.untyped_storage().data_ptr() for tensor in given.values()
        }
        return slots

    def _load_weights(self) -> list[Weight]:
        slots: list[Weight] = [None] * self._plan.size
        self._plan.setup.execute(slots)
        kept = [tensor for slot in self._plan.kept for tensor in _tensors(slots[slot])]
        self._own = frozenset(tensor.untyped_storage().data_ptr() for tensor in kept)
        return slots

    def _results(self, slots: list) -> dict[str, Any]:
        """Outputs as arrays of their own: never a view of an input, a weight or a state.

        Labels are as they are.
        """
        foreign = slots[FOREIGN] | {
            t.untyped_storage().data_ptr() for t in (slots[STATES] or {}).values()
        }
        results = {}
        for name, (slot, declared) in self._plan.outputs.items():
            value = slots[slot]
            if isinstance(value, Tensor) and isinstance(declared, TensorType):
                owned = value.untyped_storage().data_ptr() not in foreign
                value = to_numpy(value if owned else value.clone(), declared.dtype)
            results[name] = value
        return results

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The inputs that are given, checked, and the defaults of those that are not."""
        arrays = check_inputs(self.inputs, inputs, f"function '{self.name}'")
        for feature in self.inputs:
            if feature.name not in arrays:
                arrays[feature.name] = default_value(feature)
        dtypes = {feature.name: feature.type.dtype for feature in self.inputs}
        return {name: _tensor(array, dtypes[name]) for name, array in arrays.items()}

    def _check_state(self, state: State | None) -> dict[str, Tensor] | None:
        if not self.states:
            return None
        if state is None:
            raise UserError(
                f"function '{self.name}' needs a state", do="make one with make_state()"
            )
        if not isinstance(state, State):
            raise UserError(
                "the state is of another runtime",
                type(state).__name__,
                "make one with make_state()",
            )
        for feature in self.states:
            tensor = state.tensors.get(feature.name)
            wanted = (torch_dtype(feature.type.dtype), _fixed_shape(feature))
            if tensor is None or (tensor.dtype, tuple(tensor.shape)) != wanted:
                raise UserError(
                    f"the state does not fit function '{self.name}'",
                    f"{feature.name}: {'absent' if tensor is None else list(tensor.shape)}",
                    "make it with make_state() of a function of the same package",
                )
        return state.tensors


class ReferencePackage:
    """An opened package: its program is parsed once, a function read when asked for."""

    def __init__(
        self,
        program: OpenProgram,
        precision: Precision,
        memory: Memory,
        ledger: Ledger | None = None,
        name: str = "",
    ):
        self.functions = program.functions
        self.default_function = program.default_function
        # A function is often asked for right after its size.
        self._read = lru_cache(maxsize=1)(lambda name: program.read((name,)))
        self._precision = precision
        self._matrices = Matrices(memory)
        self._ledger = ledger
        self._name = name

    def function(self, name: str | None = None, *, eager: bool = False) -> ReferenceFunction:
        """Prepare a function, the default one when None; with `eager` its weights are read too.

        Raises UserError for an unknown name, a function that is not sound, or an op that is not
        executed.
        """
        name = name or self.default_function
        function = ReferenceFunction(
            self._read(name), name, self._precision, self._matrices, self._ledger, self._name
        )
        if eager:
            function.load_weights()
        return function

    def resident_bytes(self, name: str) -> int:
        """Memory that the expanded weights of a function take: fp16 but where the program says
        fp32."""
        function = self._read(name).functions[name]
        return sum(
            weight.elements * (4 if weight.format == "fp32" else 2)
            for weight in weights_of(function)
        )


class ReferencePipelinePackage:
    """An opened pipeline: one function, `main`, made of the default function of each stage.

    Raises UserError where a stage is not an ML Program.
    """

    functions = ("main",)

    def __init__(self, pipeline: OpenPipeline, precision: Precision, memory: Memory):
        self._pipeline = pipeline
        self._stages = [
            ReferencePackage(program, precision, memory) for program in pipeline.programs()
        ]

    def function(self, name: str | None = None, *, eager: bool = False) -> ReferencePipeline:
        """Prepare all stages; with `eager` their weights are read too. Raises UserError."""
        if name not in (None, *self.functions):
            raise UserError(f"no function '{name}': a pipeline has one", do="its functions: main")
        return ReferencePipeline(
            self._pipeline, [stage.function(eager=eager) for stage in self._stages]
        )

    def resident_bytes(self, name: str) -> int:
        """Memory that the expanded weights of all stages take."""
        return sum(stage.resident_bytes(stage.default_function) for stage in self._stages)


def open_package(
    path: Path,
    precision: Precision = "fp32",
    memory: Memory | None = None,
    ledger: Ledger | None = None,
) -> ReferencePackage | ReferencePipelinePackage:
    """Open the package at `path`; packages may share the `memory` for expanded weights (None: half
    of what is free). With precision "engine" what its operations meet goes to `ledger`, under the
    package's path; of a pipeline nothing does.

    Raises UserError when it cannot be read or executed.
    """
    model, memory = open_model(path), memory or weight_memory(None, 0)
    if isinstance(model, OpenPipeline):
        return ReferencePipelinePackage(model, precision, memory)
    return ReferencePackage(model, precision, memory, ledger, str(path))


def session_options(memory_mb: float | None, stored_bytes: int) -> dict[str, Any]:
    """See `ane_moe.runtime.session_options`."""
    return {"memory": weight_memory(memory_mb, stored_bytes)}


def load_function(
    path: Path, function: str | None = None, precision: Precision = "fp32"
) -> ReferenceFunction | ReferencePipeline:
    """Load `function` of the package at `path`, the default one when None.

    Raises UserError for a package that cannot be read, an unknown function, or an op that is not
    executed.
    """
    return open_package(path, precision).function(function)


def _arithmetic(precision: str, ledger: Ledger | None, site: Site) -> tuple[Arithmetic, OpTable]:
    """How sums are added up, and the operations that go with it."""
    if precision == "engine":
        return Engine(ledger, site), ENGINE_TABLE
    if precision not in PRECISIONS:
        raise UserError(
            "unknown precision", found=precision, do=f"choose one of: {', '.join(PRECISIONS)}"
        )
    return Narrow() if precision == "fp16" else Exact(), TABLE


def _tensors(value: Weight) -> list[Tensor]:
    """The tensors that a slot holds."""
    held = value.elements if isinstance(value, TensorList) else (value,)
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


def _shape(declared: ValueType | None) -> tuple[int | None, ...] | None:
    return declared.shape if isinstance(declared, TensorType) else None


def _fixed_shape(feature: Feature) -> tuple[int, ...]:
    shape = tuple(size for size in feature.type.shape if size is not None)
    if len(shape) != len(feature.type.shape):
        raise UserError(f"state '{feature.name}' has no fixed shape", sizes(feature.type.shape))
    return shape


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The array as a tensor of the declared type; may share its memory."""
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array).to(torch_dtype(dtype))
