"""Compiled models: their text gives the program of the package they were compiled from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import conftest
import numpy as np
import pytest
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.errors import UserError
from ane_moe.mlprogram import mil_text
from ane_moe.mlprogram.blob import HEADER, METADATA, SENTINEL
from ane_moe.mlprogram.program import Constant, Feature, Operation, TensorType
from ane_moe.mlprogram.reader import read_program
from ane_moe.runtime import load_package

Get = Callable[[str], Path]
NAMES = [name for name in conftest.PACKAGES if name != "loop"]


# ---- against the package


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_is_the_program_of_its_package(package: Get, name: str) -> None:
    here, there = (read_program(package(one)) for one in (f"{name}.mlmodelc", name))
    assert here.metadata == there.metadata and here.default_function == there.default_function
    assert here.specification_version == there.specification_version
    assert here.interfaces == there.interfaces and list(here.functions) == list(there.functions)
    for function in there.functions.values():
        other = here.functions[function.name]
        assert (other.opset, other.inputs) == (function.opset, function.inputs)
        assert other.block.outputs == function.block.outputs
        operations = zip(other.block.operations, function.block.operations, strict=True)
        assert all(plain(a) == plain(b) for a, b in operations)


def plain(op: Operation) -> tuple:
    """An operation with its constants as values that compare; where they are stored is left out."""
    inputs = {key: tuple(map(literal, values)) for key, values in op.inputs.items()}
    attributes = {key: literal(value) for key, value in op.attributes.items()}
    return op.type, op.name, op.outputs, inputs, attributes


def literal(value: object) -> object:
    if not isinstance(value, Constant):
        return value
    loaded = value.load()
    return value.type, loaded.tobytes() if isinstance(loaded, np.ndarray) else loaded


@pytest.mark.parametrize("name", ["net_ios15_fp32", "lut4_grouped", "int8_ios16", "pipeline"])
def test_a_compiled_model_computes_what_its_package_does(package: Get, name: str) -> None:
    x = np.random.default_rng(1).standard_normal((1, 8, 1, 4))
    here, there = (
        load_package(package(one), runtime="reference") for one in (f"{name}.mlmodelc", name)
    )
    got, wanted = here.predict({"x": x}), there.predict({"x": x})
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


# ---- by hand

OLD = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"coremlc-version", "3500.32.1]"}})]
{
    func main<ios16>(tensor<fp32, [2, 4]> x) {
            tensor<int32, []> axis = const()[name = tensor<string, []>("a \\"b\\" ]"), val = tensor<int32, []>(1)];
            tensor<int32, [2]> sizes = const()[name = tensor<string, []>("s"), val = tensor<int32, [2]>([1, 3])];
            tensor<fp32, [2, 1]> a, tensor<fp32, [2, 3]> b = split(axis = axis, split_sizes = sizes, x = x)[name = tensor<string, []>("split")];
            tensor<fp32, [2, 4]> y = concat(axis = axis, interleave = tensor<bool, []>(false), values = (b, a))[name = tensor<string, []>("y")];
        } -> (y);
}"""

NEW = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3600.16.1"}})]
{
    func first<ios17>(tensor<fp32, [?]> x) [FlexibleShapeInformation = tuple<tuple<string, dict<string, tensor<int32, [?]>>>, tuple<string, dict<string, list<tensor<int32, [2]>, ?>>>>((("DefaultShapes", {{"x", [4]}}), ("RangeDims", {{"x", [[1, 4]]}})))] {
            tensor<fp32, [?]> y = add(x = x, y = fp32(-0x1.8p+0));
        } -> (y);
    func second<ios17>(tensor<fp32, [3]> x) {
            tensor<fp32, [3]> w = constexpr_affine_dequantize()[axis = int32(0), quantized_data = tensor<int8, [3]>(BLOBFILE(path = string("@model_path/weights/weights.bin"), offset = uint64(64))), scale = fp32(0x1p-1), zero_point = int8(-1)];
            tensor<fp32, [3]> y = mul(x = x, y = w);
        } -> (y);
}
"""


def write(folder: Path, text: str, metadata: dict | None = None) -> Path:
    """A compiled model with this program, and the int8 weights 1, -1 and 5."""
    path = folder / "made.mlmodelc"
    (path / "weights").mkdir(parents=True)
    (path / "model.mil").write_text(text)
    if metadata is not None:
        (path / "metadata.json").write_text(json.dumps([metadata]))
    blob = HEADER.pack(1, 2) + METADATA.pack(SENTINEL, 4, 3, 128, 0)
    (path / "weights/weights.bin").write_bytes(blob + np.array([1, -1, 5], np.int8).tobytes())
    return path


def test_a_program_in_the_old_text_runs_without_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, OLD)
    function = load_package(path, runtime="reference")
    assert function.inputs == (Feature("x", TensorType("fp32", (2, 4))),)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert function.predict({"x": x})["y"].tolist() == [[1, 2, 3, 0], [5, 6, 7, 4]]
    operations = read_program(path).functions["main"].block.operations
    assert operations[0].name == 'a "b" ]' and read_program(path).specification_version == 7


def test_functions_weights_and_flexible_shapes_are_read_from_the_new_text(tmp_path: Path) -> None:
    def row(name: str, **more: str) -> dict:
        return {
            "name": name,
            "type": "MultiArray",
            "dataType": "Float32",
            "isOptional": "0",
            **more,
        }

    ranged = row("x", shape="[4]", shapeRange="[[1, 4]]")
    functions = [
        {"name": "first", "inputSchema": [ranged], "outputSchema": [row("y", shape="[]")]},
        {
            "name": "second",
            "inputSchema": [row("x", shape="[3]")],
            "outputSchema": [row("y", shape="[3]")],
        },
    ]
    metadata = {
        "specificationVersion": 9,
        "author": "A",
        "functions": functions,
        "defaultFunctionName": "second",
    }
    path = write(tmp_path, NEW, metadata)
    first = load_package(path, "first", "reference")
    assert first.inputs[0].ranges == ((1, 4),) and first.inputs[0].type.shape == (4,)
    assert first.predict({"x": [1, 2]})["y"].tolist() == [-0.5, 0.5]
    second = load_package(path, runtime="reference")  # the default: (q + 1) / 2 * x
    assert second.predict({"x": [1, 10, 100]})["y"].tolist() == [1, 0, 300]
    assert read_program(path).metadata == {"author": "A"}


@pytest.mark.parametrize(
    "colour, channels, layout",
    [
        ({"colorspace": "RGB"}, 3, "RGB"),
        ({"colorspace": "BGR"}, 3, "BGR"),
        ({"colorspace": "", "isColor": "0"}, 1, "grayscale"),
        ({"colorspace": "Grayscale"}, 1, "grayscale"),
    ],
)
def test_an_image_has_the_layout_of_its_metadata(
    tmp_path: Path, colour: dict, channels: int, layout: str
) -> None:
    image = {"name": "x", "type": "Image", "width": "4", "height": "2", **colour}
    shape = f"[1, {channels}, 2, 4]"
    array = {"name": "y", "type": "MultiArray", "dataType": "Float32", "shape": shape}
    text = (
        f"program(1.3){{func main<ios16>(tensor<fp32, {shape}> x) "
        f"{{tensor<fp32, {shape}> y = relu(x = x);}} -> (y);}}"
    )
    path = write(
        tmp_path, text, {"specificationVersion": 7, "inputSchema": [image], "outputSchema": [array]}
    )
    (feature,) = load_package(path, runtime="reference").inputs
    assert (feature.kind, feature.layout) == ("image", layout)
    assert feature.type.shape == (1, channels, 2, 4)


LITERALS = [
    (
        "fp16",
        "[0x1p-24, -0x1.5p-17, 0x1.ffcp+15, -inf]",
        np.float16([2**-24, -1.3125 * 2**-17, 65504, -np.inf]),
    ),
    ("fp32", "[0x1p-149, 0x1.f0a3d8p-1]", np.float32([2.0**-149, 0.97])),
    ("fp64", "[1.5, -2e3]", [1.5, -2000]),
    ("int64", "[-9223372036854775808, 7]", [-(2**63), 7]),
    ("uint16", "[65535, 0]", [65535, 0]),
    ("int4", "[-8, 7, 1]", [-8, 7, 1]),
    ("uint3", "[7, 0, 5]", [7, 0, 5]),
    ("bool", "[true, false]", [True, False]),
    ("string", '["a\\\\n", "é"]', ("a\\n", "é")),
]


@pytest.mark.parametrize("dtype, text, expected", LITERALS, ids=[item[0] for item in LITERALS])
def test_literals_have_their_values(
    tmp_path: Path, dtype: str, text: str, expected: object
) -> None:
    kind = f"tensor<{dtype}, [{len(expected)}]>"
    path = write(tmp_path, body(f"{kind} c = const()[val = {kind}({text})];"))
    (const,) = read_program(path).functions["main"].block.operations
    value = const.attributes["val"].load()
    assert value == expected if dtype == "string" else np.array_equal(value, expected)


# ---- what is refused


def body(statements: str) -> str:
    return f"program(1.3){{func main<ios18>(tensor<fp32, [2]> x) {{{statements}}} -> (x);}}"


BLOB = (
    "tensor<fp16, [2]> w = const()[val = tensor<fp16, [2]>(BLOBFILE(path = {}, "
    "offset = uint64(64)))];"
)
SUM = "tensor<fp32, [2]> y = add(x = x, y = tensor<fp32, {}>({}));"
REFUSED = {
    "empty": ("", "'the end' in line 1, expected 'program'"),
    "other version": ("program(2.0){}", "unknown version; found: '2.0'"),
    "no functions": ("program(1.3){}", "not an ML Program"),
    "more after the end": (body("") + "x", "'x' in line 1, expected a end"),
    "unknown character": (body("\n\nint32 % y"), r"'% y.*' in line 3, expected a token"),
    "open text": (body('string s = const()[val = string("'), "expected a token"),
    "unknown opset": (body("").replace("ios18", "ios99"), "unknown opset"),
    "unknown type": (body("float y = relu(x = x);"), "unknown type; found: 'float'"),
    "unknown element type": (body("tensor<f32, [2]> y = relu(x = x);"), "unknown element type"),
    "deep type": (body("list<" * 5000), "nested less deep"),
    "deep brackets": (body(SUM.format("[2]", "[" * 5000)), "an element"),
    "huge rank": (
        body(f"tensor<fp32, [{'1, ' * 5000}1]> y = relu(x = x);"),
        "impossible tensor rank",
    ),
    "huge shape": (body(f"tensor<fp32, [{2**32 - 1}, {2**32 - 1}]> y = relu(x = x);"), "too large"),
    "too few elements": (body(SUM.format("[2]", "[0x1p+0]")), r"found: 1 elements for \[2\]"),
    "ragged elements": (body(SUM.format("[2, 2]", "[[1, 2, 3], [4]]")), r"found: 3 .* for \[2\]"),
    "endless integer": (body(f"int32 y = const()[val = int32({'9' * 5000})];"), "is none"),
    "number beyond its type": (
        body("int8 y = const()[val = int8(128)];"),
        "its type cannot; found: '128'",
    ),
    "truth that is none": (body("bool y = const()[val = bool(1)];"), "truth value"),
    "text without quotes": (body("string y = const()[val = string(a)];"), "without quotes"),
    "unknown escape": (body('string y = const()[val = string("\\q")];'), "unknown escape"),
    "blocks": (body("tensor<fp32, [2]> y = cond(pred = bool(true)) { };"), "'cond' has blocks"),
    "parameter twice": (body("tensor<fp32, [2]> y = relu(x = x, x = x);"), "parameter twice"),
    "function twice": (body("").replace("func", "func main<ios18>() {} -> (); func"), "twice"),
    "undefined name": (body("tensor<fp32, [2]> y = relu(x = z);"), "not defined before"),
    "weights outside": (body(BLOB.format('string("@model_path/../w.bin")')), "outside itself"),
    "weights elsewhere": (body(BLOB.format('string("/etc/passwd")')), "not named relative"),
    "weights of weights": (body(BLOB.format("string(BLOBFILE(" * 3000)), "text without quotes"),
    "absent weights": (body(BLOB.format('string("@model_path/w.bin")')), "lacks a file it names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_that_is_no_program_is_one_clear_error(tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        read_program(write(tmp_path, text))
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_a_text_of_too_many_parts_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mil_text, "MAX_TOKENS", 100)
    with pytest.raises(UserError, match="too many parts; found: 100 or more"):
        read_program(write(tmp_path, OLD))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row.update(type="Video"), "unknown type; found: 'Video'"),
        (lambda row: row.update(dataType="Float8"), "dataType"),
        (lambda row: row.update(shape="[1, 2"), "shape; found"),
        (lambda row: row.update(shape=[2]), "shape"),
        (lambda row: row.update(shape="[9]"), "described otherwise"),
        (lambda row: row.update(shapeRange="[[1]]"), "shapeRange"),
        (lambda row: row.update(name="\ud800"), "metadata.json"),
        (lambda row: row.clear(), "unknown type"),
    ],
)
def test_metadata_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    row = {"name": "x", "type": "MultiArray", "dataType": "Float32", "shape": "[2]"}
    metadata = {"specificationVersion": 9, "inputSchema": [dict(row)], "outputSchema": [dict(row)]}
    change(metadata["inputSchema"][0])
    with pytest.raises(UserError, match=message):
        read_program(write(tmp_path, body(""), metadata))


def test_a_compiled_neural_network_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "old.mlmodelc").mkdir()
    (tmp_path / "old.mlmodelc/model.espresso.net").touch()
    with pytest.raises(UserError, match=r"no ML Program \(no model\.mil\).*re-convert"):
        read_program(tmp_path / "old.mlmodelc")


def test_a_compiled_model_is_inspected_and_run_on_the_command_line(package: Get) -> None:
    path = str(package("lut4_grouped.mlmodelc"))
    shown = CliRunner().invoke(app, ["inspect", path, "--ops"])
    assert shown.exit_code == 0 and "lut4 g8" in shown.stdout
    assert "constexpr_lut_to_dense" in shown.stdout
    ran = CliRunner().invoke(app, ["run", path, "--seed", "0", "--json"])
    assert json.loads(ran.stdout)["outputs"][0]["shape"] == [1, 16, 1, 4]
    same = CliRunner().invoke(app, ["diff", path, str(package("lut4_grouped"))])
    assert same.exit_code == 0 and "none apart; worst" in same.stdout


def test_a_compiled_model_without_its_weights_is_shown(package: Get, tmp_path: Path) -> None:
    path = shutil.copytree(package("lut4_grouped.mlmodelc"), tmp_path / "bare.mlmodelc")
    shutil.rmtree(path / "weights")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0 and "lacks a file it names" in shown.stdout
