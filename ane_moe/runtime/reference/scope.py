"""What names stand for while a function is prepared."""

from dataclasses import dataclass, field
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Constant, TensorType, ValueType
from ane_moe.mlprogram.values import describe
from ane_moe.runtime.reference.ops.table import Kernel, Op
from ane_moe.runtime.reference.steps import Steps

STATES = 0  # the slot of the state's tensors, by name
FOREIGN = 1  # the slot of the storages that belong to the caller
FIRST = 2  # the first slot of a value


@dataclass(eq=False)
class Value:
    """Something a name stands for: a slot, a constant or compressed weight not yet in a slot, or
    both."""

    type: ValueType
    slot: int | None = None
    constant: Constant | None = None
    fixed: bool = False  # the same in every call: constants and what is computed from them
    name: str = ""  # of a constant, for errors in reading it
    expansion: "Expansion | None" = None  # what expands it, of a compressed weight


@dataclass(frozen=True, eq=False)
class Expansion:
    """A constexpr operation of the function `where`: its parameters, what it is given in its
    kernel's order, and what it gives."""

    op: Op
    name: str
    where: str
    parameters: dict[str, Any]
    kernel: Kernel
    given: tuple[Value | None, ...]
    results: tuple[Value, ...]


@dataclass
class Scope:
    """The names of a block, its steps, and the wide (fp32) copies of fp16 values made in it."""

    steps: Steps
    outer: "Scope | None" = None
    names: dict[str, Value] = field(default_factory=dict)
    wide: dict[Value, int] = field(default_factory=dict)

    def find(self, name: str) -> Value:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        raise UserError("the program uses a name that nothing defines", name)

    def find_wide(self, value: Value) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if value in scope.wide:
                return scope.wide[value]
            scope = scope.outer
        return None


def tensor_type(value: Value, name: str) -> TensorType:
    """The type of `value`; raises UserError where it is a state, a list or the like."""
    if not isinstance(value.type, TensorType):
        raise UserError(f"'{name}' is not a tensor", describe(value.type))
    return value.type
