import json
import math
import re
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.commands.inspect import inspect
from ane_moe.coreml_tools import MIL_pb2, Model_pb2, ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.printer import program_text
from ane_moe.mlprogram.reader import read_program
from ane_moe.mlprogram.summary import summarize, summary_document
from ane_moe.runtime import load_package

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")

# The two convolution weights (64 x 8 and 16 x 64) in each package; the bias stays fp16.
FORMATS = {
    "net_ios15_fp32": {"fp32"},
    "net_ios18_fp16": {"fp16"},
    "lut4_ios16": {"lut4 per tensor", "fp16"},
    "lut6_ios18": {"lut6 per tensor", "fp16"},
    "lut3_ios18": {"lut3 per tensor", "fp16"},
    "lut4_grouped": {"lut4 g8", "fp16"},
    "lut2_vector": {"lut2 per tensor vectors of 2", "fp16"},
    "int8_ios16": {"int8 per channel", "fp16"},
    "int8_ios18": {"int8 per channel", "fp16"},
    "int4_block": {"int4 block 8", "int4 per channel", "fp16"},  # 8 of 8 channels are one block
    "uint4_tensor": {"uint4 per tensor", "fp16"},
    "sparse_ios16": {"sparse 50% fp16", "fp16"},
    "sparse_ios18": {"sparse 50% fp16", "fp16"},
    "sparse_lut4": {"sparse 50% lut4", "fp16"},
    "sparse_int8": {"sparse 50% int8 per channel", "fp16"},
    "lut4_int8": {"lut4 per tensor, palette int8 per tensor", "fp16"},
}

# Bytes of the two weights' elements and of what expands them; the bias adds 128.
STORED_BYTES = {
    "net_ios18_fp16": 2 * 1536,
    "lut6_ios18": 1536 * 6 // 8 + 2 * 64 * 2,
    "lut4_grouped": 1536 // 2 + (8 + 2) * 16 * 2,
    "int8_ios18": 1536 + (64 + 16) * 2,
    "sparse_ios18": 1536 // 8 + 768 * 2,
    "sparse_lut4": 1536 // 8 + 768 // 2 + 2 * 16 * 2,
}


@pytest.mark.parametrize("name", FORMATS)
def test_weight_formats_are_named(package, name):
    assert {total.format for total in summarize(package(name)).formats} == FORMATS[name]


@pytest.mark.parametrize("name", STORED_BYTES)
def test_stored_bytes_are_those_of_the_elements_and_their_parameters(package, name):
    summary = summarize(package(name))
    assert summary.weight_bytes == STORED_BYTES[name] + 128
    assert sum(total.stored_bytes for total in summary.formats) == summary.weight_bytes
    assert sum(math.prod(weight.shape) for weight in summary.functions[0].weights) == 1536 + 64


def test_weights_that_functions_share_are_counted_once(package):
    summary = summarize(package("multifunction"))
    assert [function.weight_bytes for function in summary.functions] == [3200, 3200]
    assert summary.weight_bytes == 3200
    assert [total.weights for total in summary.formats] == [3]


def test_the_histogram_is_the_one_coremltools_counts(package):
    path = package("net_ios17_fp16")
    counted = (
        ct.models.utils.load_spec(str(path))
        .mlProgram.functions["main"]
        .block_specializations["CoreML7"]
    )
    operations = summarize(path).functions[0].operations
    assert sum(operations.values()) == len(counted.operations)
    assert operations["conv"] == 2


def test_operations_inside_control_flow_are_counted(package):
    assert summarize(package("loop")).functions[0].operations["sub"] == 1


def test_metadata_and_versions_are_told(package, tmp_path):
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "named.mlpackage")
    model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    model.description.metadata.author = "A. Author"
    model.description.metadata.license = "Apache-2.0"
    (path / MODEL).write_bytes(model.SerializeToString())
    summary = summarize(path)
    assert (summary.metadata["author"], summary.metadata["license"]) == ("A. Author", "Apache-2.0")
    assert summary.metadata["com.github.apple.coremltools.version"] == ct.__version__
    assert (summary.system, summary.specification_version) == ("iOS 18", 9)


def test_constexpr_operations_stacked_without_end_are_refused(package, tmp_path):
    path = shutil.copytree(package("lut4_int8"), tmp_path / "stacked.mlpackage")
    model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
    last = next(op for op in block.operations if op.type == "constexpr_lut_to_dense")
    steps = [MIL_pb2.Operation.FromString(op.SerializeToString()) for op in block.operations]
    for index in range(50):
        step = MIL_pb2.Operation.FromString(last.SerializeToString())
        step.inputs["lut"].arguments[0].name = (steps[-1] if index else last).outputs[0].name
        step.outputs[0].name = f"step_{index}"
        steps.append(step)
    del block.operations[:]
    block.operations.extend(steps)
    (path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="stacked too deep"):
        summarize(path)


def test_the_program_text_shows_each_operation_with_its_small_literals_in_place(package):
    text = "\n".join(program_text(read_program(package("net_ios18_fp16"))))
    assert text.startswith("main(x: fp16[1,8,1,4]) opset CoreML8 {")
    assert "strides=[1, 1]" in text
    assert "bytes>" in text
    assert text.endswith("  return y\n}")


def test_the_program_text_shows_nested_blocks(package):
    text = "\n".join(program_text(read_program(package("loop"))))
    assert "while_loop(loop_vars=(0, var_9, x)) {" in text
    assert text.count("return") == 5
    assert text.count("{") == text.count("}") == 5


def _invoke(*arguments: str):
    app = typer.Typer()
    app.command()(inspect)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    "name", ["stateful", "multifunction", "enumerated", "flexible", "sparse_lut4", "loop"]
)
def test_the_command_prints_one_json_document(package, name):
    path = package(name)
    result = _invoke(str(path), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads(json.dumps(summary_document(summarize(path))))
    assert {"inputs", "outputs", "states", "operations", "weights"} <= document["functions"][
        0
    ].keys()


def test_the_command_prints_tables_and_the_program(package):
    result = _invoke(str(package("stateful")), "--ops")
    assert result.exit_code == 0, result.output
    for text in ("iOS 18", "function main", "state", "total", "read_state", "coremltools.version"):
        assert text in result.stdout
    assert "write_state(data=" in result.stdout


def test_names_in_a_package_cannot_drive_the_terminal(package, tmp_path):
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "hostile.mlpackage")
    model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    model.description.metadata.author = "\x1b[2J[red]author[/nope]\u202e"
    block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
    block.operations.add(type="\x1b]0;title\x07[bold").outputs.add(
        name="[/]"
    ).type.tensorType.dataType = MIL_pb2.BOOL
    (path / MODEL).write_bytes(model.SerializeToString())
    result = _invoke(str(path), "--ops")
    assert result.exit_code == 0, result.output
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)
    assert "[red]author[/nope]" in result.stdout
    assert "[bold" in result.stdout


def test_a_file_that_is_not_a_package_ends_in_one_clear_error(tmp_path):
    (tmp_path / "model.mlmodel").touch()
    result = _invoke(str(tmp_path / "model.mlmodel"))
    assert isinstance(result.exception, UserError)
    assert "expected an .mlpackage folder" in str(result.exception)


WEIGHTS = MODEL.parent / "weights/weight.bin"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "change, found",
    [
        (Path.unlink, "package lacks a file it names; found: 'weights/weight.bin'; download"),
        (lambda path: path.write_text(POINTER), "found: a Git LFS pointer; run `git lfs pull`"),
    ],
)
def test_a_program_is_shown_without_its_weights_and_is_not_run(package, tmp_path, change, found):
    whole = summarize(package("lut4_int8"))
    path = shutil.copytree(package("lut4_int8"), tmp_path / "bare.mlpackage")
    change(path / WEIGHTS)
    bare = summarize(path)
    assert bare.weight_bytes == whole.weight_bytes and not whole.absent
    assert bare.functions[0].operations == whole.functions[0].operations
    assert [total.format for total in bare.formats] == [total.format for total in whole.formats]
    assert len(bare.absent) == 1 and found in bare.absent[0]
    result = _invoke(str(path), "--ops")
    assert result.exit_code == 0 and "bytes declared" in result.stdout
    assert "constexpr_lut_to_dense" in result.stdout
    with pytest.raises(UserError, match=re.escape(found)):
        load_package(path, runtime="reference")


def test_a_program_file_that_is_a_pointer_is_told(package, tmp_path):
    path = shutil.copytree(package("net_ios18_fp16"), tmp_path / "pointer.mlpackage")
    (path / MODEL).write_text(POINTER)
    result = _invoke(str(path))
    assert "model.mlmodel has not been downloaded; found: a Git LFS" in str(result.exception)


def test_a_folder_of_packages_is_told_from_one(tmp_path: Path) -> None:
    for name in ("layer_01.aimodel", "layer_00.aimodel", "notes"):
        (tmp_path / name).mkdir()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(shown.exception, UserError)
    assert "is a folder of packages; found: 2 of them; name one: " in str(shown.exception)
    assert str(shown.exception).endswith("layer_00.aimodel")
