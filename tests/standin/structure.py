"""An ML Program as coremltools' `MLModelStructure` classes, built the way CoreMLPython.mm builds
them."""

from coremltools.models import compute_plan as ct_plan

from ane_moe.mlprogram.program import Block, Function, Operation, Output, Program
from tests.standin import native

OPSET_NAMES = {
    "CoreML5": "ios15",
    "CoreML6": "ios16",
    "CoreML7": "ios17",
    "CoreML8": "ios18",
    "CoreML9": "ios26",
}
BARE = ("const", "pad", "tile")


def model_structure(program: Program) -> ct_plan.MLModelStructure:
    """The structure of a compiled model; every operation carries a proxy naming (function,
    operation)."""
    functions = {name: _function(function) for name, function in program.functions.items()}
    return ct_plan.MLModelStructure(None, ct_plan.MLModelStructureProgram(functions), None)


def operator_name(type_: str, opset: str) -> str:
    """Published compute plans name most operations with the program's opset ("ios18.conv") and
    these few without."""
    return type_ if type_ in BARE else f"{OPSET_NAMES[opset]}.{type_}"


def _function(function: Function) -> ct_plan.MLModelStructureProgramFunction:
    return ct_plan.MLModelStructureProgramFunction(
        _named(function.inputs), _block(function.block, function)
    )


def _block(block: Block, function: Function) -> ct_plan.MLModelStructureProgramBlock:
    operations = [_operation(operation, function) for operation in block.operations]
    return ct_plan.MLModelStructureProgramBlock(
        _named(block.inputs), operations, list(block.outputs)
    )


def _operation(
    operation: Operation, function: Function
) -> ct_plan.MLModelStructureProgramOperation:
    inputs = {
        name: ct_plan.MLModelStructureProgramArgument(
            [_binding(argument) for argument in arguments]
        )
        for name, arguments in operation.inputs.items()
    }
    proxy = native._MLModelStructureProgramOperationProxy._make(function.name, operation)
    return ct_plan.MLModelStructureProgramOperation(
        inputs,
        operator_name(operation.type, function.opset),
        _named(operation.outputs),
        [_block(block, function) for block in operation.blocks],
        proxy,
    )


def _binding(argument: object) -> ct_plan.MLModelStructureProgramBinding:
    if isinstance(argument, str):
        return ct_plan.MLModelStructureProgramBinding(argument, None)
    return ct_plan.MLModelStructureProgramBinding(None, ct_plan.MLModelStructureProgramValue())


def _named(outputs: tuple[Output, ...]) -> list[ct_plan.MLModelStructureProgramNamedValueType]:
    return [
        ct_plan.MLModelStructureProgramNamedValueType(
            output.name, ct_plan.MLModelStructureProgramValueType()
        )
        for output in outputs
    ]
