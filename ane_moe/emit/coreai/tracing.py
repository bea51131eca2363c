"""From a Core ML template to one for Core AI: its operations written again, its weights still
unbound.

Weights are *inputs* of the graphs, as they are while a block is traced (emit/coreml/tracing.py): no
pass can fold or round them, and a distinct block goes through Apple's converter once, whatever its
weights are.
"""

import re
from pathlib import Path

from ane_moe.emit.coreml.template import Template, value_name
from ane_moe.mlprogram.container import Container
from ane_moe.mlprogram.program import Program
from ane_moe.mlprogram.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
from ane_moe.mlprogram.reader import program_of
from ane_moe.mlprogram.values import ValueReader
from ane_moe.runtime.coreai.twin import converted, mlir_module

# A large constant in the text of a module, and where its bytes are told.
SEEDED = re.compile(r'(?<=dense_resource<)resource_\d+(?=>)|\bresource_\d+(?=: "0x)')


def make_asset_template(template: Template) -> Template:
    """The graphs of `template` as text of Core AI's, each weight an input by its program's name.

    Raises UserError where Core AI is not installed, and for an operation that it lacks.
    """
    program = with_open_weights(template)
    module = mlir_module(converted({name: (program, name) for name in program.functions}))
    text = module.operation.get_asm(enable_debug_info=True)  # with the names of operations
    return Template(with_numbered_constants(text).encode(), template.weights)


def with_numbered_constants(text: str) -> str:
    """The text of a module, the same for the same module: Apple's converter calls a large constant
    by a hash of its bytes that each process seeds anew."""
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"constant{len(numbers):06d}")

    return SEEDED.sub(numbered, text)


def with_open_weights(template: Template) -> Program:
    """The program of a template, each weight an input."""
    model = Model_pb2.Model.FromString(template.model)
    names = {value_name(name) for name in template.weights}
    described = {function.name: function for function in model.description.functions}
    for name, function in model.mlProgram.functions.items():
        block = function.block_specializations[function.opset]
        open_ = [op for op in block.operations if _is_constant(op, names)]
        kept = [op for op in block.operations if not _is_constant(op, names)]
        for op in open_:
            function.inputs.append(op.outputs[0])
            feature = described[name].input.add(name=op.outputs[0].name).type.multiArrayType
            feature.dataType = FeatureTypes_pb2.ArrayFeatureType.FLOAT16
            sizes = op.outputs[0].type.tensorType.dimensions
            feature.shape.extend(size.constant.size for size in sizes)
        fresh = MIL_pb2.Block(operations=kept, inputs=block.inputs, outputs=block.outputs)
        block.CopyFrom(fresh)
    nowhere = Path("template")  # a template has its small constants inside
    return program_of(model, nowhere, ValueReader(Container(nowhere, nowhere))).read()


def _is_constant(op: MIL_pb2.Operation, names: set[str]) -> bool:
    return op.type == "const" and op.outputs[0].name in names
