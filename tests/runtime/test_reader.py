import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import conftest
import numpy as np
import psutil
import pytest
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.frontend.milproto.load import load as load_with_coremltools

from ane_moe.coreml_tools import MIL_pb2, Model_pb2, ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.blob import HEADER, METADATA, SENTINEL
from ane_moe.mlprogram.container import Container
from ane_moe.mlprogram.program import Constant, ListType, StateType, TensorType
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.values import ValueReader
from ane_moe.mlprogram.weights import operations_of
from ane_moe.mlprogram.wire import count_messages

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")

COMPRESSED = ("lut", "int", "uint", "sparse")

types = ct.converters.mil.mil.types


def _oracle(path: Path):
    model = Model_pb2.Model()
    model.ParseFromString((path / MODEL).read_bytes())
    return load_with_coremltools(model, model.specificationVersion, str(path / WEIGHTS.parent))


@pytest.mark.parametrize("name", sorted(conftest.PACKAGES))
def test_constants_are_those_that_coremltools_reads(package, name):
    path = package(name)
    expected = {
        (function, op.outputs[0].name): op.outputs[0].val
        for function, block in _oracle(path).functions.items()
        for op in block.operations
        if op.op_type == "const"
    }
    compared = 0
    for function in read_program(path).functions.values():
        for op in function.block.operations:
            if op.type == "const":
                value = op.attributes["val"].load()
                wanted = expected[function.name, op.outputs[0].name]
                assert value == wanted if isinstance(value, str) else np.array_equal(value, wanted)
                compared += 1
    assert compared > 0


@pytest.mark.parametrize(
    "name", [name for name in conftest.PACKAGES if name.startswith(COMPRESSED)]
)
def test_parameters_of_compressed_weights_are_those_that_coremltools_reads(package, name):
    path = package(name)
    expected = {
        op.outputs[0].name: {
            key: var.val for key, var in op.inputs.items() if var.op.op_type == "const"
        }
        for op in _oracle(path).functions["main"].operations
        if op.op_type.startswith("constexpr_")
    }
    read = [
        op
        for op in read_program(path).functions["main"].block.operations
        if op.type.startswith("constexpr_")
    ]
    assert len(read) == len(expected) > 0
    for op in read:
        arguments = op.attributes or {key: value for key, (value,) in op.inputs.items()}
        literals = {
            key: value.load() for key, value in arguments.items() if isinstance(value, Constant)
        }
        for key, wanted in expected[op.outputs[0].name].items():
            np.testing.assert_array_equal(
                literals[key], np.asarray(wanted).astype(literals[key].dtype), err_msg=key
            )


@pytest.mark.parametrize("target", sorted(conftest.TARGETS))
@pytest.mark.parametrize("precision", sorted(conftest.PRECISIONS))
def test_the_interface_is_what_was_converted(package, target, precision):
    program = read_program(package(f"net_{target}_{precision}"))
    interface = program.interfaces["main"]
    dtype = "fp32" if precision == "fp32" or target == "ios15" else "fp16"
    assert [(item.name, item.type) for item in interface.inputs] == [
        ("x", TensorType(dtype, (1, 8, 1, 4)))
    ]
    assert [(item.name, item.type) for item in interface.outputs] == [
        ("y", TensorType(dtype, (1, 16, 1, 4)))
    ]
    assert program.functions["main"].opset == f"CoreML{int(target[3:]) - 10}"
    assert program.specification_version == int(target[3:]) - 9


def test_states_are_apart_from_inputs(package):
    program = read_program(package("stateful"))
    interface = program.interfaces["main"]
    assert [item.name for item in interface.inputs] == ["x"]
    assert [(item.name, item.type) for item in interface.states] == [
        ("total", TensorType("fp16", (1, 4)))
    ]
    declared = {item.name: item.type for item in program.functions["main"].inputs}
    assert declared["total"] == StateType(TensorType("fp16", (1, 4)))


def test_functions_of_one_package_share_their_weights(package):
    program = read_program(package("multifunction"))
    assert list(program.functions) == ["decode", "prefill"]
    assert program.default_function == "decode"
    stored = [
        {op.attributes["val"].blob for op in function.block.operations if op.type == "const"}
        - {None}
        for function in program.functions.values()
    ]
    assert stored[0] == stored[1] != set()


def test_flexible_shapes_are_told(package):
    ranged = read_program(package("flexible")).interfaces["main"].inputs[0]
    assert ranged.ranges == ((1, 1), (8, 8), (1, 1), (1, 16))
    assert ranged.type.shape == (1, 8, 1, 4)
    listed = read_program(package("enumerated")).interfaces["main"].inputs[0]
    assert listed.shapes == ((1, 8, 1, 4), (1, 8, 1, 1))


def test_features_that_are_no_arrays_are_named_by_their_kind(package):
    interface = read_program(package("classifier")).interfaces["main"]
    assert [(item.kind, item.type) for item in interface.inputs] == [
        ("image", TensorType("fp32", (1, 3, 8, 8)))
    ]
    assert {item.name: item.kind for item in interface.outputs} == {
        "classLabel": "string",
        "classLabel_probs": "dictionary",
    }


def test_blocks_of_control_flow_are_read(package):
    operations = {
        op.type: op for op in read_program(package("loop")).functions["main"].block.operations
    }
    loop, branches = operations["while_loop"].blocks, operations["cond"].blocks
    assert [len(block.inputs) for block in loop] == [3, 3]
    assert [len(block.outputs) for block in loop] == [1, 3]
    assert [[op.type for op in block.operations if op.type != "const"] for block in branches] == [
        ["sub"],
        ["add"],
    ]


INLINE = [
    np.float16(1.5),
    np.float32(-2),
    np.int32(-7),
    np.bool_(True),
    np.array([1, -2, 3], np.int8),
    np.array([1, 255], np.uint8),
    np.array([-300, 5], np.int16),
    np.array([65535], np.uint16),
    np.array([[1, 2], [3, 4]], np.int32),
    np.array([True, False, True]),
    np.array([0.1, 0.2], np.float16),
    np.array([[0.1], [0.2]], np.float32),
    np.zeros((0, 3), np.float16),
    np.array([-8, 7, 1], types.np_int4_dtype),
    np.array([1, 0, 1, 1, 1, 0, 0, 1, 1], types.np_uint1_dtype),
    np.array([3, 2, 1], types.np_uint2_dtype),
    np.array([7, 0, 5, 6], types.np_uint3_dtype),
    np.array([15, 1], types.np_uint4_dtype),
    np.array([63, 1, 40], types.np_uint6_dtype),
]


@pytest.mark.parametrize(
    "value", INLINE, ids=lambda value: f"{types.numpy_type_to_builtin_type(value.dtype).__name__}"
)
def test_inline_literals_are_those_that_coremltools_wrote(tmp_path, value):
    written = (
        helper.create_tensor_value(np.asarray(value))
        if value.ndim
        else helper.create_scalar_value(value)
    )
    read = (
        ValueReader(Container(tmp_path, tmp_path / "model.mlmodel"))
        .read(_reparsed(written), "value")
        .load()
    )
    assert read.shape == value.shape
    np.testing.assert_array_equal(read, value.astype(read.dtype))


def _reparsed(value: object) -> object:
    return MIL_pb2.Value.FromString(value.SerializeToString())


def test_lists_and_dictionaries_are_read_as_tuples(tmp_path):
    reader = ValueReader(Container(tmp_path, tmp_path / "model.mlmodel"))
    names = reader.read(helper.create_list_scalarvalue(["a", "b"], str), "names")
    assert (names.type, names.load()) == (ListType(TensorType("string", ()), 2), ("a", "b"))
    pair = MIL_pb2.Value()
    text, number = helper.create_scalar_value("a"), helper.create_scalar_value(np.int32(3))
    pair.type.dictionaryType.keyType.CopyFrom(text.type)
    pair.type.dictionaryType.valueType.CopyFrom(number.type)
    item = pair.immediateValue.dictionary.values.add()
    item.key.CopyFrom(text)
    item.value.CopyFrom(number)
    assert reader.read(pair, "pair").load() == (("a", 3),)


def test_an_integer_that_its_type_cannot_hold_is_refused_when_loaded(tmp_path):
    value = helper.create_tensor_value(np.array([3, 4], np.int16))
    value.immediateValue.tensor.ints.values[0] = 40000
    constant = ValueReader(Container(tmp_path, tmp_path / "model.mlmodel")).read(value, "axis")
    with pytest.raises(UserError, match="axis holds numbers"):
        constant.load()


def test_reading_needs_neither_coremltools_nor_torch(package):
    code = (
        "import sys, pathlib; from ane_moe.mlprogram.reader import read_program; from "
        "ane_moe.mlprogram.summary import "
        f"summarize; summarize(read_program(pathlib.Path({str(package('lut4_grouped'))!r}))); "
        "assert not {'coremltools', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_protobuf_classes_are_the_ones_coremltools_uses():
    from ane_moe.mlprogram import proto

    assert proto.Model_pb2.Model is Model_pb2.Model


def test_opening_a_package_of_two_gigabytes_takes_next_to_no_memory(tmp_path):
    path, count, nbytes = _package_with_large_weights(tmp_path)
    before = psutil.Process().memory_info().rss
    program = read_program(path)
    constants = [
        op.attributes["val"]
        for op in program.functions["main"].block.operations
        if op.type == "const"
    ]
    assert sum(item.nbytes for item in constants if item.blob) == count * nbytes == 2 << 30
    assert psutil.Process().memory_info().rss - before < 16 << 20
    for constant in constants[:64]:  # half a gigabyte of the file, one after the other
        assert constant.load().any() == 0
    assert psutil.Process().memory_info().rss - before < 128 << 20


def _package_with_large_weights(folder: Path) -> tuple[Path, int, int]:
    """256 constants of 8 MB each, in a sparse file that takes no room on the disk."""
    path, count, nbytes = folder / "large.mlpackage", 256, 8 << 20
    model = Model_pb2.Model(specificationVersion=9)
    function = model.mlProgram.functions["main"]
    function.opset = "CoreML8"
    block = function.block_specializations["CoreML8"]
    (path / WEIGHTS.parent).mkdir(parents=True)
    with (path / WEIGHTS).open("wb") as file:
        file.write(HEADER.pack(count, 2))
        for index in range(count):
            offset = 64 + index * (64 + nbytes)
            file.seek(offset)
            file.write(METADATA.pack(SENTINEL, 1, nbytes, offset + 64, 0))
            op = block.operations.add(type="const")
            value = op.attributes["val"]
            value.blobFileValue.fileName = "@model_path/weights/weight.bin"
            value.blobFileValue.offset = offset
            helper.update_tensortype(value.type.tensorType, (nbytes // 2,), MIL_pb2.FLOAT16)
            op.outputs.add(name=f"w{index}").type.CopyFrom(value.type)
        file.truncate(offset + 64 + nbytes)
    (path / MODEL).write_bytes(model.SerializeToString())
    entry = {
        "path": "com.apple.CoreML/model.mlmodel",
        "name": "model.mlmodel",
        "author": "",
        "description": "",
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {"a": entry},
        "rootModelIdentifier": "a",
    }
    (path / "Manifest.json").write_text(json.dumps(manifest))
    return path, count, nbytes


# Damage: what is changed in a copy of a package, and below what the error must say.
Damage = Callable[[Path], None]


def _in_model(change: Callable[[object], None]) -> Damage:
    def damage(path: Path) -> None:
        model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
        change(model)
        (path / MODEL).write_bytes(model.SerializeToString())

    return damage


def _in_block(change: Callable[[object], None]) -> Damage:
    return _in_model(
        lambda model: change(
            next(iter(model.mlProgram.functions["main"].block_specializations.values()))
        )
    )


def _weight(block: object) -> object:
    return next(
        op.attributes["val"]
        for op in block.operations
        if op.attributes["val"].HasField("blobFileValue")
    )


def _first_op(block: object) -> object:
    return next(op for op in block.operations if op.type != "const")


def _in_manifest(change: Callable[[dict], object]) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "Manifest.json").read_text())
        changed = change(manifest)
        (path / "Manifest.json").write_text(json.dumps(manifest if changed is None else changed))

    return damage


def _set_root(path: str) -> Damage:
    def change(manifest: dict) -> None:
        manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path

    return _in_manifest(change)


def _weight_name(name: str) -> Damage:
    return _in_block(lambda block: setattr(_weight(block).blobFileValue, "fileName", name))


def _link_out(path: Path) -> None:
    outside = path.parent / "outside.bin"
    shutil.move(path / WEIGHTS, outside)
    (path / WEIGHTS).symlink_to(outside)


def _link_loop(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / WEIGHTS)


def _fifo(path: Path) -> None:
    (path / WEIGHTS).unlink()
    os.mkfifo(path / WEIGHTS)


def _huge_shape(block: object) -> None:
    dimensions = _weight(block).type.tensorType.dimensions
    for dimension in dimensions:
        dimension.constant.size = 1 << 15


def _add_cond(block: object) -> object:
    op = block.operations.add(type="cond")
    op.inputs["pred"].arguments.add().value.CopyFrom(helper.create_scalar_value(True))
    op.blocks.add()
    op.blocks.add()
    return op


def _nested(model: object) -> None:
    block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
    for _ in range(40):
        block = _add_cond(block).blocks[1]


def _nested_too_deep(path: Path) -> None:
    data = b""
    for _ in range(5000):
        for field in (b"\x22", b"\x1a"):  # blocks of an operation, operations of a block
            data = field + _varint(len(data)) + data
    for field in (b"\x12", b"\x1a", b"\x12", b"\x12", b"\xb2\x1f"):  # block ... mlProgram
        data = field + _varint(len(data)) + data
    (path / MODEL).write_bytes(data)


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def _swap_ops(block: object) -> None:
    operations = [type(op).FromString(op.SerializeToString()) for op in block.operations]
    del block.operations[:]
    block.operations.extend(reversed(operations))


def _shadow(block: object) -> None:
    outer = _first_op(block).outputs[0]
    nested = _add_cond(block).blocks[0]
    nested.operations.add(type="relu").outputs.add().CopyFrom(outer)


def _other_output_type(block: object) -> None:
    block.operations[0].outputs[0].type.tensorType.dataType = MIL_pb2.UINT64


def _rename_output(model: object) -> None:
    model.description.output[0].name = "z"


def _describe_other_shape(model: object) -> None:
    model.description.input[0].type.multiArrayType.shape[1] = 9


def _describe_other_dtype(model: object) -> None:
    model.description.input[0].type.multiArrayType.dataType = 131104


def _extra_function(model: object) -> None:
    model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "manifest is not JSON": (
        lambda path: (path / "Manifest.json").write_text("{"),
        "not valid JSON",
    ),
    "manifest is nested deep": (
        lambda path: (path / "Manifest.json").write_text("[" * 100_000),
        "not valid JSON",
    ),
    "manifest is not UTF-8": (
        lambda path: (path / "Manifest.json").write_bytes(b"\xff{}"),
        "not valid JSON",
    ),
    "manifest is a list": (_in_manifest(lambda manifest: []), "not an object"),
    "manifest is absurdly large": (
        lambda path: os.truncate(path / "Manifest.json", 1 << 32),
        "too large",
    ),
    "manifest has another version": (
        _in_manifest(lambda manifest: {"fileFormatVersion": "2.0"}),
        "format version",
    ),
    "manifest names no model": (
        _in_manifest(lambda manifest: {"fileFormatVersion": "1.0.0"}),
        "root model",
    ),
    "root model is a number": (
        _in_manifest(lambda manifest: manifest.update(rootModelIdentifier=3)),
        "root model",
    ),
    "entries are a list": (
        _in_manifest(lambda manifest: manifest.update(itemInfoEntries=[])),
        "root model",
    ),
    "manifest is absent": (lambda path: (path / "Manifest.json").unlink(), "no Manifest.json"),
    "root model is absolute": (_set_root("/etc/passwd"), "outside itself"),
    "root model climbs out": (_set_root("../../outside"), "outside itself"),
    "root model has a NUL": (_set_root("model\0"), "unusable path"),
    "root model has a lone surrogate": (_set_root("\ud800"), "unusable path"),
    "root model has an endless name": (_set_root("a" * 5000), "unusable path"),
    "root model is a folder": (_set_root("com.apple.CoreML"), "lacks a file"),
    "root model is absent": (_set_root("nowhere.mlmodel"), "lacks a file"),
    "program file is cut short": (lambda path: os.truncate(path / MODEL, 700), "cannot be parsed"),
    "program file is empty": (lambda path: os.truncate(path / MODEL, 0), "not an ML Program"),
    "program file is too large": (lambda path: os.truncate(path / MODEL, 1 << 40), "too large"),
    "program file is noise": (
        lambda path: (path / MODEL).write_bytes(bytes(range(256)) * 9),
        "cannot be parsed",
    ),
    "weight file is absent": (lambda path: (path / WEIGHTS).unlink(), "lacks a file"),
    "weight file is cut short": (lambda path: os.truncate(path / WEIGHTS, 200), "(outside|slot)"),
    "weight file is a link out": (_link_out, "link that leads outside"),
    "weight file is a link to itself": (_link_loop, "(unusable path|lacks a file)"),
    "weight file is a pipe": (_fifo, "lacks a file"),
    "weight name climbs out": (_weight_name("@model_path/../../../outside.bin"), "outside itself"),
    "weight name is absolute": (_weight_name("/etc/passwd"), "not named relative"),
    "weight name is absolute below the model": (
        _weight_name("@model_path//etc/passwd"),
        "outside itself",
    ),
    "weight name is empty": (_weight_name("@model_path/"), "outside itself"),
    "weight offset is huge": (
        _in_block(lambda block: setattr(_weight(block).blobFileValue, "offset", 2**64 - 64)),
        "metadata slot",
    ),
    "shape is huge": (_in_block(_huge_shape), "too large"),
    "rank is wrong": (
        _in_block(lambda block: setattr(_weight(block).type.tensorType, "rank", 3)),
        "tensor rank",
    ),
    "rank is huge": (
        _in_block(lambda block: setattr(_weight(block).type.tensorType, "rank", 2**62)),
        "tensor rank",
    ),
    "dimension is empty": (
        _in_block(lambda block: _weight(block).type.tensorType.dimensions[0].Clear()),
        "without a size",
    ),
    "element type is unknown": (
        _in_block(lambda block: setattr(_weight(block).type.tensorType, "dataType", 77)),
        "unknown element type",
    ),
    "element type is another": (
        _in_block(lambda block: setattr(_weight(block).type.tensorType, "dataType", MIL_pb2.INT8)),
        "not stored as",
    ),
    "output has no type": (
        _in_block(lambda block: block.operations[0].outputs[0].type.Clear()),
        "without a type",
    ),
    "constant differs from its output": (
        _in_block(_other_output_type),
        "another type than it declares",
    ),
    "constant has no value": (
        _in_block(lambda block: _weight(block).ClearField("blobFileValue")),
        "no value",
    ),
    "operation has no type": (
        _in_block(lambda block: block.operations[0].ClearField("type")),
        "has no type",
    ),
    "value is used before it is defined": (_in_block(_swap_ops), "not defined before"),
    "value is defined twice": (
        _in_block(lambda block: block.operations.add().CopyFrom(block.operations[0])),
        "exists already",
    ),
    "value is defined again inside": (_in_block(_shadow), "exists already"),
    "output is not defined": (
        _in_block(lambda block: block.outputs.append("nowhere")),
        "not defined before",
    ),
    "argument is empty": (
        _in_block(lambda block: _first_op(block).inputs["x"].arguments.add()),
        "bound to nothing",
    ),
    "cond has no predicate": (
        _in_block(lambda block: _add_cond(block).inputs.clear()),
        "needs one argument",
    ),
    "cond has three branches": (
        _in_block(lambda block: _add_cond(block).blocks.add()),
        "number of blocks",
    ),
    "loop has no condition": (
        _in_block(lambda block: setattr(_add_cond(block), "type", "while_loop")),
        "lacks loop_vars",
    ),
    "state is read without an output": (
        _in_block(lambda block: block.operations.add(type="read_state")),
        "number of outputs",
    ),
    "operation has a block it should not have": (
        _in_block(lambda block: _first_op(block).blocks.add()),
        "number of blocks",
    ),
    "blocks are nested without end": (_nested_too_deep, "cannot be parsed"),
    "opset is unknown": (
        _in_model(lambda model: setattr(model.mlProgram.functions["main"], "opset", "CoreML99")),
        "unknown opset",
    ),
    "opset has no block": (
        _in_model(lambda model: setattr(model.mlProgram.functions["main"], "opset", "CoreML5")),
        "no block",
    ),
    "program is empty": (
        _in_model(lambda model: model.mlProgram.functions.clear()),
        "no functions",
    ),
    "model is of another kind": (
        _in_model(lambda model: model.identity.SetInParent()),
        "not an ML Program",
    ),
    "specification version is unknown": (
        _in_model(lambda model: setattr(model, "specificationVersion", 99)),
        "specification version",
    ),
    "description names another output": (_in_model(_rename_output), "does not exist"),
    "description has no inputs": (
        _in_model(lambda model: model.description.ClearField("input")),
        "other inputs",
    ),
    "description has another shape": (_in_model(_describe_other_shape), "described otherwise"),
    "description has another element type": (
        _in_model(_describe_other_dtype),
        "described otherwise",
    ),
    "description lacks a function": (_in_model(_extra_function), "different functions"),
    "default function is unknown": (
        _in_model(lambda model: setattr(model.description, "defaultFunctionName", "f")),
        "default function",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(package, tmp_path, name):
    damage, message = DAMAGES[name]
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "damaged.mlpackage")
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        read_program(path)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_blocks_may_be_nested_as_deep_as_protobuf_parses(package, tmp_path):
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "nested.mlpackage")
    _in_model(_nested)(path)
    assert (
        sum(op.type == "cond" for op in operations_of(read_program(path).functions["main"].block))
        == 40
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.mlmodel", "expected an .mlpackage"),
        ("model.mlmodelc", "compiled"),
        ("no", "no such"),
    ],
)
def test_what_is_not_a_package_is_told_apart(package, tmp_path, name, message):
    (tmp_path / "model.mlmodelc").mkdir()
    shutil.copy(package("net_ios18_fp16") / MODEL, tmp_path / "model.mlmodel")
    with pytest.raises(UserError, match=message):
        read_program(tmp_path / name)


def test_a_link_that_stays_inside_the_package_is_followed(package, tmp_path):
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "linked.mlpackage")
    shutil.move(path / WEIGHTS, path / "Data" / "elsewhere.bin")
    (path / WEIGHTS).symlink_to("../../elsewhere.bin")
    assert read_program(path).functions


def test_a_file_of_tiny_messages_is_counted_before_it_is_parsed():
    block = MIL_pb2.Block()
    for _ in range(1000):
        block.operations.add()
    data = block.SerializeToString()
    assert count_messages(data, MIL_pb2.Block, 10**6) == 1000
    assert count_messages(data, MIL_pb2.Block, 10) == 10
    with pytest.raises(UserError, match="cannot be parsed"):
        count_messages(data[:-1], MIL_pb2.Block, 10**6)
