"""Ops that deal with names, blocks or states instead of tensors alone."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import (
    Argument,
    Block,
    DictionaryType,
    Function,
    Operation,
    Output,
    StateType,
    TensorType,
)
from ane_moe.mlprogram.values import describe
from ane_moe.runtime.reference.scope import FOREIGN, STATES, Scope, Value
from ane_moe.runtime.reference.steps import AnyTarget, Run, Slots, Step, Steps, target


class Planner(Protocol):
    """What `plan` offers to the ops here."""

    function: Function

    def new_slot(self) -> int: ...

    def slot(self, value: Value) -> int: ...

    def argument(self, argument: Argument, scope: Scope) -> Value: ...

    def operations(self, block: Block, scope: Scope) -> None: ...


# A package may come from anywhere, and an endless loop is easily written. No model of language
# loops this often.
MAX_ITERATIONS = 100_000

Prepare = Callable[[Planner, Operation, Scope], None]


def _one(operation: Operation, key: str) -> Argument:
    bound = operation.inputs.get(key, ())
    if len(bound) != 1:
        raise UserError(f"input '{key}' takes one value", str(len(bound)))
    return bound[0]


def _add(
    scope: Scope,
    operation: Operation,
    run: Run,
    reads: Sequence[int],
    slots: Sequence[int],
    arrays: bool = True,
) -> None:
    """Append a step whose results are the operation's outputs, and give them their names.

    Results that are arrays can be observed.
    """
    for output, slot in zip(operation.outputs, slots, strict=True):
        scope.names[output.name] = Value(output.type, slot)
    named = zip(operation.outputs, slots, strict=True)
    shown = tuple(
        (output.name, slot)
        for output, slot in named
        if arrays and isinstance(output.type, TensorType)
    )
    scope.steps.steps.append(
        Step(operation.type, operation.name, run, frozenset(reads), frozenset(slots), shown)
    )


def _const(planner: Planner, operation: Operation, scope: Scope) -> None:
    if len(operation.outputs) != 1 or "val" not in operation.attributes:
        raise UserError("a constant needs one output and a value", str(len(operation.outputs)))
    name = operation.outputs[0].name
    scope.names[name] = Value(
        operation.outputs[0].type,
        constant=operation.attributes["val"],
        fixed=True,
        name=operation.name,
    )


# ---- states


def _state(planner: Planner, operation: Operation) -> tuple[str, TensorType]:
    name = _one(operation, "input")
    declared = {given.name: given.type for given in planner.function.inputs}
    kind = declared.get(name) if isinstance(name, str) else None
    if not isinstance(kind, StateType) or not isinstance(name, str):
        raise UserError("input 'input' is not a state", str(name))
    return name, kind.tensor


def _read_state(planner: Planner, operation: Operation, scope: Scope) -> None:
    name, kind = _state(planner, operation)
    if [output.type for output in operation.outputs] != [kind]:
        given = ", ".join(describe(output.type) for output in operation.outputs)
        raise UserError("result has another type than the state", f"{given} for {describe(kind)}")
    slot = planner.new_slot()

    def run(slots: Slots) -> None:
        slots[slot] = slots[STATES][name]

    _add(scope, operation, run, (), (slot,))


def _write_state(planner: Planner, operation: Operation, scope: Scope) -> None:
    name, kind = _state(planner, operation)
    value = planner.argument(_one(operation, "data"), scope)
    if value.type != kind:
        raise UserError(
            "data has another type than the state", f"{describe(value.type)} for {describe(kind)}"
        )
    slot = planner.slot(value)

    def run(slots: Slots) -> None:
        data: Tensor = slots[slot]
        owned = data.untyped_storage().data_ptr() not in slots[FOREIGN]
        slots[STATES][name] = data if owned else data.clone()

    _add(scope, operation, run, (slot,), ())


# ---- blocks


def _nested(
    planner: Planner, block: Block, scope: Scope, inputs: Sequence[int]
) -> tuple[Steps, list[int]]:
    """The steps of a block inside an op, and the slots of its outputs."""
    inner = Scope(Steps(scope.steps.where), scope)
    for given, slot in zip(block.inputs, inputs, strict=True):
        inner.names[given.name] = Value(given.type, slot)
    planner.operations(block, inner)
    outputs = [planner.slot(inner.find(name)) for name in block.outputs]
    inner.steps.free_dead(frozenset(outputs))
    return inner.steps, outputs


def _reads(*blocks: Steps) -> set[int]:
    return {slot for steps in blocks for step in steps.steps for slot in step.reads}


def _targets(planner: Planner, outputs: Sequence[Output]) -> list[AnyTarget]:
    return [target(planner.new_slot(), output.type, False) for output in outputs]


def _same_count(*counts: int) -> None:
    if len(set(counts)) != 1:
        raise UserError(
            "its blocks do not agree on the number of values", ", ".join(map(str, counts))
        )


def _cond(planner: Planner, operation: Operation, scope: Scope) -> None:
    test = planner.slot(planner.argument(_one(operation, "pred"), scope))
    _same_count(len(operation.blocks), 2)
    (yes, yes_outputs), (no, no_outputs) = (
        _nested(planner, block, scope, ()) for block in operation.blocks
    )
    targets = _targets(planner, operation.outputs)
    _same_count(len(targets), len(yes_outputs), len(no_outputs))

    def run(slots: Slots) -> None:
        taken, outputs = (yes, yes_outputs) if bool(slots[test]) else (no, no_outputs)
        taken.execute(slots)
        for into, slot in zip(targets, outputs, strict=True):
            slots[into.slot] = into.fit(slots[slot])

    reads = [test, *yes_outputs, *no_outputs, *_reads(yes, no)]
    _add(scope, operation, run, reads, [into.slot for into in targets])


def _while_loop(planner: Planner, operation: Operation, scope: Scope) -> None:
    first = [
        planner.slot(planner.argument(one, scope)) for one in operation.inputs.get("loop_vars", ())
    ]
    _same_count(len(operation.blocks), 2)
    test_block, body_block = operation.blocks
    _same_count(
        len(first),
        len(test_block.inputs),
        len(body_block.inputs),
        len(body_block.outputs),
        len(operation.outputs),
    )
    _same_count(len(test_block.outputs), 1)
    test_inputs, body_inputs = ([planner.new_slot() for _ in first] for _ in range(2))
    test, (decision,) = _nested(planner, test_block, scope, test_inputs)
    body, results = _nested(planner, body_block, scope, body_inputs)
    targets = _targets(planner, operation.outputs)

    def run(slots: Slots) -> None:
        values = [slots[slot] for slot in first]
        for _ in range(MAX_ITERATIONS):
            for slot, value in zip(test_inputs, values, strict=True):
                slots[slot] = value
            test.execute(slots)
            if not bool(slots[decision]):
                break
            for slot, value in zip(body_inputs, values, strict=True):
                slots[slot] = value
            body.execute(slots)
            values = [slots[slot] for slot in results]
        else:
            raise UserError(
                f"the loop {operation.name} does not end",
                f"{MAX_ITERATIONS} iterations",
                "do not trust this package",
            )
        for into, value in zip(targets, values, strict=True):
            slots[into.slot] = into.fit(value)

    reads = [*first, decision, *results, *_reads(test, body)]
    _add(scope, operation, run, reads, [into.slot for into in targets])


# ---- labels


def _classify(planner: Planner, operation: Operation, scope: Scope) -> None:
    """The likeliest label and the probability of each, as Core ML's `predict` gives them."""
    probabilities = planner.slot(planner.argument(_one(operation, "probabilities"), scope))
    classes = planner.argument(_one(operation, "classes"), scope).constant
    kinds = [output.type for output in operation.outputs]
    if classes is None:
        raise UserError("its classes have to be constant")
    if [type(kind) for kind in kinds] != [TensorType, DictionaryType]:
        raise UserError(
            "its results are not a label and a dictionary", ", ".join(map(describe, kinds))
        )
    labels = [each.item() if isinstance(each, np.ndarray) else each for each in classes.load()]
    made = label, by_label = planner.new_slot(), planner.new_slot()

    def run(slots: Slots) -> None:
        given: Tensor = slots[probabilities].flatten()
        if len(given) != len(labels) or not labels:
            raise UserError(
                "it has another number of probabilities than of classes",
                f"{len(given)} for {len(labels)}",
            )
        slots[label] = labels[int(given.argmax())]
        slots[by_label] = dict(zip(labels, given.tolist(), strict=True))

    _add(scope, operation, run, (probabilities,), made, arrays=False)


STRUCTURAL: dict[str, Prepare] = {
    "const": _const,
    "read_state": _read_state,
    "write_state": _write_state,
    "cond": _cond,
    "while_loop": _while_loop,
    "classify": _classify,
}
