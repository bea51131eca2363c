"""Scripted compute plans: which device each operation of a program would get.

A plan is data: `default` is the device of every operation no rule names (None: no usage is
reported), `rules` are tried in order, and a rule matches by `function`, `op` (MIL name without
opset) and `nth` (position among the matching operations of its function, from 0), whichever it has.
`fault` is a fault of script.py, committed when the plan is loaded; with `fault_function`, only for
a package whose default function is that. `program: false` reports a structure without a program.
Constants never have a usage or a cost, and neither has any operation outside the default function:
coremltools loads the plan without naming one.
"""

from dataclasses import dataclass
from typing import Any

from ane_moe.mlprogram.program import Block, Operation, Program

PLANS: dict[str, dict[str, Any]] = {
    "all_engine": {"default": "engine"},
    "conv_on_cpu": {"default": "engine", "rules": [{"op": "conv", "nth": 0, "device": "cpu"}]},
    "function_on_gpu": {"default": "engine", "rules": [{"function": "prefill", "device": "gpu"}]},
    "all_cpu": {"default": "cpu"},
    "empty": {"default": None},
    "no_program": {"default": "engine", "program": False},
    "error": {"default": "engine", "fault": "error"},
    "crash": {"default": "engine", "fault": "crash"},
    "kill": {"default": "engine", "fault": "kill"},
    "hang": {"default": "engine", "fault": "hang"},
}

NO_USAGE = ("const",)
# Which devices an operation planned for the key could also run on.
SUPPORTED = {"engine": ("cpu", "gpu", "engine"), "gpu": ("cpu", "gpu"), "cpu": ("cpu",)}
UNITS = {
    "CPU_ONLY": ("cpu",),
    "CPU_AND_GPU": ("cpu", "gpu"),
    "CPU_AND_NE": ("cpu", "engine"),
    "ALL": ("cpu", "gpu", "engine"),
}


@dataclass(frozen=True)
class Placement:
    preferred: str
    supported: tuple[str, ...]
    cost: float


def read_plan(plan: str | dict[str, Any]) -> dict[str, Any]:
    """A plan by name, or the plan itself; unknown keys are an error of the test."""
    data = PLANS[plan] if isinstance(plan, str) else plan
    assert data.keys() <= {"default", "rules", "fault", "fault_function", "program"}, data
    return data


def place(program: Program, plan: dict[str, Any], units: str) -> dict[int, Placement]:
    """Placement by `id` of the operation. Devices that `units` leave out become the CPU, as in Core
    ML."""
    placements = {}
    function = program.functions[program.default_function]
    chosen = {
        id(operation): device
        for operation, device in _devices(function.name, function.block, plan)
        if device is not None and operation.type not in NO_USAGE
    }
    for key, device in chosen.items():
        preferred = device if device in UNITS[units] else "cpu"
        supported = tuple(other for other in SUPPORTED[preferred] if other in UNITS[units])
        placements[key] = Placement(preferred, supported, 1.0 / len(chosen))
    return placements


def _devices(
    function: str, block: Block, plan: dict[str, Any]
) -> list[tuple[Operation, str | None]]:
    seen: dict[str, int] = {}
    found: list[tuple[Operation, str | None]] = []

    def walk(block: Block) -> None:
        for operation in block.operations:
            nth = seen.get(operation.type, 0)
            seen[operation.type] = nth + 1
            facts = {"function": function, "op": operation.type, "nth": nth}
            matching = [
                rule
                for rule in plan.get("rules", ())
                if all(facts[name] == value for name, value in rule.items() if name != "device")
            ]
            found.append((operation, matching[0]["device"] if matching else plan["default"]))
            for inner in operation.blocks:
                walk(inner)

    walk(block)
    return found
