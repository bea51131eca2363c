"""From a block to a template: one Core ML graph per distinct block, its weights still unbound.

The weights are *inputs* of the traced graph. So tracing and converting never touch their values
(the cost does not depend on their size), no graph pass can fold, merge or round them, and what must
be proved afterwards is small:
every weight is still an input, of the same shape, used by the same kind of operation, in the same
order.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ane_moe.coreml_tools import BlobReader, ct, validating_once
from ane_moe.emit.coreml.template import Template, value_name
from ane_moe.emit.coreml.token_count import MARKER, with_token_count
from ane_moe.mlprogram.proto import MIL_pb2, Model_pb2
from ane_moe.model.part import PartConfig
from ane_moe.model.port import Port, Ports, Shape, shapes_of
from ane_moe.model.template_key import TemplateKey
from ane_moe.parts.block import Block, give
from ane_moe.parts.unbound import build_unbound

# What our graphs need of coremltools' 95 default passes: a quarter of the time, the same program.
# In particular none of those that fold weights.
PASSES = [
    f"common::{name}"
    for name in (
        "update_output_dtypes",
        "noop_elimination",
        "const_elimination",
        "fuse_transpose_matmul",
        "merge_consecutive_reshapes",
        "merge_consecutive_transposes",
        "add_fp16_cast",
        "update_output_dtypes",
        "const_elimination",
        "cast_optimization",
        "dead_code_elimination",
        "canonicalize_inplace_pattern",
        "prefer_state_in_downstream",
        "const_elimination",
        "noop_elimination",
        "remove_redundant_ops",
        "dedup_op_and_var_names",
        "topological_reorder",
        "dead_code_elimination",
    )
]
CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"
# MIL operation: torch operation that may consume a weight directly.
CONSUMERS = {
    "conv": "aten::_convolution",
    "mul": "aten::mul",
    "add": "aten::add",
    "reshape": "aten::reshape",
    "real_div": "aten::div",
}


class ConversionError(Exception):
    """The converter did not keep a weight where the traced block has it: a defect, never the user's
    fault."""


def make_template(key: TemplateKey) -> Template:
    """Trace and convert the block of `key` and join its functions into one specification.

    Raises ConversionError when a weight cannot be proved to be where the block has it.
    """
    block = build_unbound(key.block)
    weights = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    whole: dict[PartConfig, Model_pb2.Model] = {}
    programs = {}
    for name, tokens in key.functions:
        part = key.block_of(name)
        if not block.one_trace:
            programs[name] = _program(part, key.layout, tokens, tokens)
            continue
        if part not in whole:
            whole[part] = _program(part, key.layout, 1, MARKER)
        programs[name] = with_token_count(whole[part], tokens)
    return Template(_join(programs), weights)


def _program(part: PartConfig, layout: str, traced_for: int, tokens: int) -> Model_pb2.Model:
    """The block converted for calls of so many tokens. Tracing puts plain tensors where a block had
    its parameters: each trace takes a fresh one."""
    block = build_unbound(part)
    weights = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    traced = _trace(block, block.ports(traced_for), layout)
    return _convert(traced, block.ports(tokens), weights, layout)


class _Unbound(nn.Module):
    """Calls a block whose weights arrive as further positional inputs after the block's own."""

    def __init__(self, block: Block, ports: Ports, layout: str):
        super().__init__()
        self.hidden = [block]  # in a list: the tracer must not see the meta parameters
        self.ports = ports
        self.layout = layout
        self.weight_names = [name for name, _ in block.named_parameters()]
        for port in ports.states:
            self.register_buffer(port.name, torch.zeros(port.shape))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        block, ports = self.hidden[0], self.ports
        count = len(ports.inputs)
        for name, weight in zip(self.weight_names, values[count:], strict=True):
            give(block, name, weight)
        given = zip(ports.inputs, values[:count], strict=True)
        inputs = {port.name: self._oriented(port, value) for port, value in given}
        outputs = block(**inputs, **{port.name: getattr(self, port.name) for port in ports.states})
        return tuple(self._oriented(port, outputs[port.name]) for port in ports.outputs)

    def _oriented(self, port: Port, value: Tensor) -> Tensor:
        return value.transpose(2, 3) if self.layout == "bct1" and port.by_channel else value


def _declared(ports: Iterable[Port], layout: str) -> dict[str, Shape]:
    """Shapes by name, as the program has them."""
    return shapes_of(port.turned() if layout == "bct1" else port for port in ports)


def _trace(block: Block, ports: Ports, layout: str) -> torch.jit.ScriptModule:
    """Trace the block, at one token where the graph holds for any."""
    # Stride 0: any shape in four bytes. Weights are not 0, since some divide.
    examples = [torch.zeros(()).expand(shape) for shape in _declared(ports.inputs, layout).values()]
    examples += [torch.ones(()).expand(parameter.shape) for parameter in block.parameters()]
    with torch.no_grad():
        return torch.jit.trace(_Unbound(block, ports, layout).eval(), examples, check_trace=False)


def _convert(
    traced: torch.jit.ScriptModule, ports: Ports, shapes: dict[str, Shape], layout: str
) -> Model_pb2.Model:
    """Convert the trace for the token count of `ports`; checks the weights against the trace."""
    inputs = _declared(ports.inputs, layout)
    placeholders = {name: _placeholder(index) for index, name in enumerate(shapes)}
    declared = {**inputs, **{placeholders[name]: shape for name, shape in shapes.items()}}
    half = {"dtype": np.float16}
    with validating_once():
        model = ct.convert(
            traced,
            inputs=[
                ct.TensorType(name=name, shape=shape, **half) for name, shape in declared.items()
            ],
            outputs=[ct.TensorType(name=port.name, **half) for port in ports.outputs],
            states=[
                ct.StateType(ct.TensorType(shape=port.shape, **half), name=port.name)
                for port in ports.states
            ]
            or None,
            minimum_deployment_target=ct.target.iOS18,
            pass_pipeline=ct.PassPipeline(PASSES, "ane-moe"),
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )
    model._mil_program.validate()
    specification = model.get_spec()
    _inline_constants(specification, model.weights_dir)
    _prove(traced, len(inputs), list(shapes), specification, placeholders)
    _bind_placeholders(specification, shapes, placeholders)
    return specification


def _placeholder(index: int) -> str:
    return f"weight_{index:05d}"


def _operations(model: Model_pb2.Model) -> MIL_pb2.Block:
    (function,) = model.mlProgram.functions.values()
    return function.block_specializations[function.opset]


def _inline_constants(model: Model_pb2.Model, weights_dir: str) -> None:
    """Move the graph's own small constants (the router's ramp) from the blob file into the
    protobuf."""
    reader = None
    for operation in _operations(model).operations:
        for attribute in operation.attributes.values():
            if attribute.WhichOneof("value") != "blobFileValue":
                continue
            reader = reader or BlobReader(f"{weights_dir}/weight.bin")
            if attribute.type.tensorType.dataType != MIL_pb2.FLOAT16:
                raise ConversionError(f"constant of {operation.outputs[0].name} is not fp16")
            data = np.asarray(
                reader.read_fp16_data(attribute.blobFileValue.offset), dtype=np.uint16
            )
            attribute.immediateValue.tensor.bytes.values = data.tobytes()


def _prove(
    traced: torch.jit.ScriptModule,
    n_inputs: int,
    names: list[str],
    model: Model_pb2.Model,
    placeholders: dict[str, str],
) -> None:
    """Check that the program uses every weight exactly as the trace does: same order of first use,
    same operation."""
    expected = _uses_in_trace(traced, n_inputs, names)
    if unused := set(names) - {name for name, _ in expected}:
        raise ConversionError(f"the block never uses its weights {sorted(unused)[:5]}")
    back = {placeholder: name for name, placeholder in placeholders.items()}
    found = [
        (back[binding.name], operation.type)
        for operation in _operations(model).operations
        for _, argument in sorted(operation.inputs.items())  # a map of protobuf has no order
        for binding in argument.arguments
        if binding.name in back
    ]
    translated = [(name, CONSUMERS.get(kind, kind)) for name, kind in found]
    if translated != expected:
        wrong = next(((e, t) for e, t in zip(expected, translated, strict=False) if e != t), None)
        missing = sorted({name for name, _ in expected} - {name for name, _ in translated})
        raise ConversionError(
            f"weights moved during conversion: missing {missing[:5]}, first difference {wrong}"
        )


def _uses_in_trace(
    traced: torch.jit.ScriptModule, n_inputs: int, names: list[str]
) -> list[tuple[str, str]]:
    graph = traced.inlined_graph
    # The first of the inputs is the module itself.
    values = [value.debugName() for value in graph.inputs()][1 + n_inputs :]
    by_value = dict(zip(values, names, strict=True))
    return [
        (
            by_value[argument.debugName()],
            node.kind().rstrip("_") if node.kind() != CONSUMERS["conv"] else node.kind(),
        )
        for node in graph.nodes()
        for argument in node.inputs()
        if argument.debugName() in by_value
    ]


def _bind_placeholders(
    model: Model_pb2.Model, shapes: dict[str, Shape], placeholders: dict[str, str]
) -> None:
    """Turn the weight inputs into `const` operations named as the block's parameters."""
    (function,) = model.mlProgram.functions.values()
    back = {placeholder: name for name, placeholder in placeholders.items()}
    kept = [value for value in function.inputs if value.name not in back]
    if len(function.inputs) - len(kept) != len(shapes):
        raise ConversionError("a weight is no longer an input of the converted program")
    types = {back[value.name]: value.type for value in function.inputs if value.name in back}
    for name, shape in shapes.items():
        declared = tuple(dimension.constant.size for dimension in types[name].tensorType.dimensions)
        if declared != shape or types[name].tensorType.dataType != MIL_pb2.FLOAT16:
            raise ConversionError(f"weight {name} is declared as {declared}, traced as {shape}")
    constants = [_constant(name, types[name]) for name in shapes]
    block = _operations(model)
    operations = [*constants, *block.operations]
    for operation in operations[len(constants) :]:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.name in back:
                    binding.name = value_name(back[binding.name])
    fresh = MIL_pb2.Block(operations=operations, inputs=block.inputs, outputs=block.outputs)
    block.CopyFrom(fresh)
    del function.inputs[:]
    function.inputs.extend(kept)
    features = [feature for feature in model.description.input if feature.name not in back]
    del model.description.input[:]
    model.description.input.extend(features)


def _constant(name: str, type_: MIL_pb2.ValueType) -> MIL_pb2.Operation:
    operation = MIL_pb2.Operation(
        type="const", outputs=[MIL_pb2.NamedValueType(name=value_name(name), type=type_)]
    )
    label = operation.attributes["name"]
    label.type.tensorType.dataType = MIL_pb2.STRING
    label.immediateValue.tensor.strings.values.append(value_name(name))
    operation.attributes["val"].type.CopyFrom(type_)
    return operation


def _join(programs: dict[str, Model_pb2.Model]) -> bytes:
    """One multi-function specification; the first function is the default."""
    names = list(programs)
    joined = Model_pb2.Model()
    joined.CopyFrom(programs[names[0]])
    for field in ("input", "output", "state"):
        joined.description.ClearField(field)
    joined.mlProgram.functions.clear()
    joined.description.defaultFunctionName = names[0]
    # The same input gives the same bytes, any day.
    joined.description.metadata.userDefined.pop(CONVERSION_DATE, None)
    for name, program in programs.items():
        (function,) = program.mlProgram.functions.values()
        joined.mlProgram.functions[name].CopyFrom(function)
        description = joined.description.functions.add(name=name)
        for field in ("input", "output", "state"):
            getattr(description, field).extend(getattr(program.description, field))
    return joined.SerializeToString(deterministic=True)
