"""Assets of Core AI: what is bound to a template is what its runtime computes with, in every weight
format. What needs Apple's packages is skipped without them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import psutil
import pytest

from ane_moe.emit.coreml.package import ContentKey
from ane_moe.emit.coreml.template import Template
from ane_moe.errors import UserError
from ane_moe.formats.encoded import Encoded
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format

HAS_CORE_AI = importlib.util.find_spec("coreai_torch") is not None
pytestmark = pytest.mark.skipif(not HAS_CORE_AI, reason="Core AI's packages are not installed")

ROWS, COLUMNS, TOKENS = 64, 96, 4
# One convolution, as Core AI prints it, its weight an input.
TEXT = f"""module {{
  coreai.graph @y(%x: tensor<1x{COLUMNS}x1x{TOKENS}xf16> {{coreai.name = "x"}},
      %w: tensor<{ROWS}x{COLUMNS}x1x1xf16> {{coreai.name = "w_weight"}})
      -> (tensor<1x{ROWS}x1x{TOKENS}xf16> {{coreai.name = "y"}}) attributes {{__coreai_pure__}} {{
    %0 = coreai.constant dense<1> : tensor<ui32>
    %1 = coreai.constant dense<1> : tensor<2xui32>
    %2 = coreai.conv2d %x, %w, %1, %1, %0 : (tensor<1x{COLUMNS}x1x{TOKENS}xf16>,
      tensor<{ROWS}x{COLUMNS}x1x1xf16>, tensor<2xui32>, tensor<2xui32>, tensor<ui32>)
      -> tensor<1x{ROWS}x1x{TOKENS}xf16>
    coreai.output %2 : tensor<1x{ROWS}x1x{TOKENS}xf16>
  }}
}}"""
TEMPLATE = Template(TEXT.encode(), {"weight": (ROWS, COLUMNS, 1, 1)})
FORMATS = (
    "fp16",
    "int8",
    "int4-channel",
    "int8-block32",
    "int4-block32",
    "apple2",
    *(f"lut{bits}" for bits in (8, 6, 4, 3, 2)),
    "lut6-g8",
    "lut4-tensor",
    "lut4-v2",
    "lut8-v4",
    "lut4+scale",
    "sparse50",
    "sparse50+lut4",
    "sparse50+int8",
)


def encoded(form: str) -> np.ndarray | Encoded:
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float16) / 8
    return find_format(form).encode(weight) or weight


def dense(value: np.ndarray | Encoded) -> np.ndarray:
    return expand(value) if isinstance(value, Encoded) else value


def leaves(document: object) -> list[str]:
    """The texts of a JSON document."""
    inner = list(document.values()) if isinstance(document, dict) else document
    if isinstance(inner, list):
        return [text for each in inner for text in leaves(each)]
    return [inner] if isinstance(inner, str) else []


@pytest.fixture(scope="module")
def asset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the template for each format, in one asset."""
    from ane_moe.emit.coreai.asset import stamp_asset

    path = tmp_path_factory.mktemp("formats") / "formats.aimodel"
    templates = dict.fromkeys(FORMATS, TEMPLATE)
    values = ((f"{form}/weight", encoded(form)) for form in FORMATS)
    written = stamp_asset(templates, values, ContentKey("formats"), path)
    assert sorted(written.files) == ["main.hash", "main.mlirb", "metadata.json"]
    return path


@pytest.fixture(scope="module")
def package(asset: Path):
    from ane_moe.runtime import open_package

    return open_package(asset)


@pytest.mark.parametrize("form", FORMATS)
def test_core_ai_computes_with_what_a_format_stands_for(package, form: str) -> None:
    x = np.random.default_rng(1).standard_normal((1, COLUMNS, 1, TOKENS)).astype(np.float16)
    found = package.function(f"{form}_y").predict({"x": x})["y"][0, :, 0]
    expected = dense(encoded(form)).astype(np.float32) @ x[0, :, 0].astype(np.float32)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMATS)
def test_the_asset_holds_the_bits_that_a_format_says(asset: Path, form: str) -> None:
    """Not their expansion: the arrays in the file are those of the encoder, packed."""
    from ane_moe.emit.coreai.asset import read_weights
    from ane_moe.emit.coreai.bytecode import read_arrays

    name = f"{form}/weight"
    ((_, found),) = read_weights(asset, lambda other: other == name)
    np.testing.assert_array_equal(dense(found).reshape(ROWS, COLUMNS), dense(encoded(form)))
    arrays = read_arrays(asset / "main.mlirb")
    told = json.loads((asset / "metadata.json").read_text())["creatorDefinedMetadata"]["ane_moe"]
    names = {text for text in leaves(told["weights"][name]) if text in arrays}
    stored = sum(arrays[each].nbytes for each in names)
    assert stored == find_format(form).stored_bytes(ROWS, COLUMNS)


def test_the_same_weights_give_the_same_bytes(asset: Path, tmp_path: Path) -> None:
    from ane_moe.emit.coreai.asset import read_asset_key, stamp_asset

    written = [
        stamp_asset(
            {"": TEMPLATE}, [("weight", encoded("lut4"))], ContentKey(), tmp_path / f"{n}.aimodel"
        )
        for n in range(2)
    ]
    assert written[0] == written[1]
    assert read_asset_key(tmp_path / "0.aimodel") == written[0].content_key
    assert read_asset_key(tmp_path) is None


def test_large_constants_are_called_the_same_in_every_process(tmp_path: Path) -> None:
    """Apple's converter names them by a hash, of another seed in each process."""
    import coreai_torch
    import torch

    from ane_moe.emit.coreai.asset import stamp_asset
    from ane_moe.emit.coreai.bytecode import read_arrays
    from ane_moe.emit.coreai.tracing import SEEDED, with_numbered_constants
    from ane_moe.runtime.coreai.installed import quiet
    from ane_moe.runtime.coreai.twin import mlir_module

    constants = [torch.arange(4096.0).reshape(64, 64) + number for number in range(3)]

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * constants[0] + x * constants[1] * constants[2] + constants[1]

    converter = coreai_torch.TorchConverter()
    exported = torch.export.export(Product(), (torch.zeros(64, 64),))
    table = coreai_torch.get_decomp_table()
    with quiet():
        converter.add_exported_program(
            exported.run_decompositions(table), input_names=["x"], output_names=["y"]
        )
        text = mlir_module(converter.to_coreai()).operation.get_asm()
    names = dict.fromkeys(SEEDED.findall(text))
    assert len(names) == 3
    another = text
    for number, name in enumerate(names):  # as another process would, one shorter than another
        another = another.replace(name, f"resource_{7 ** (number + 9)}")
    settled = with_numbered_constants(text)
    assert another != text and with_numbered_constants(another) == settled
    path = tmp_path / "a.aimodel"
    stamp_asset({"": Template(settled.encode(), {})}, [], ContentKey(), path)
    found = read_arrays(path / "main.mlirb")
    assert sorted(found) == [f"constant{number:06d}" for number in range(3)]
    stored = sorted(array.view(np.float32)[0] for array in found.values())
    assert stored == [0, 1, 2]


def test_a_weight_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    from ane_moe.emit.coreai.asset import stamp_asset

    for values in ([], [("weight", np.zeros((3, 3), np.float16))]):
        with pytest.raises(ValueError):
            stamp_asset({"": TEMPLATE}, values, ContentKey(), tmp_path / "a.aimodel")
    assert not list(tmp_path.iterdir())


def test_one_weight_of_two_copies_lies_in_the_asset_once(tmp_path: Path) -> None:
    from ane_moe.emit.coreai.asset import read_weights, stamp_asset
    from ane_moe.emit.coreai.bytecode import read_arrays

    path = tmp_path / "a.aimodel"
    weight = encoded("fp16")
    shared = {"b/weight": "a/weight"}
    stamp_asset({"a": TEMPLATE, "b": TEMPLATE}, [("a/weight", weight)], ContentKey(), path, shared)
    (array,) = read_arrays(path / "main.mlirb").values()
    assert array.nbytes == 2 * ROWS * COLUMNS
    found = dict(read_weights(path))
    assert found.keys() == {"a/weight", "b/weight"}
    np.testing.assert_array_equal(found["b/weight"].reshape(ROWS, COLUMNS), weight)


@pytest.mark.parametrize("size", [3, 40, 400])
def test_bytecode_that_ends_too_soon_is_one_line(asset: Path, tmp_path: Path, size: int) -> None:
    from ane_moe.emit.coreai.bytecode import read_arrays

    path = tmp_path / "main.mlirb"
    path.write_bytes((asset / "main.mlirb").read_bytes()[:size])
    with pytest.raises(UserError, match="damaged"):
        read_arrays(path)


@pytest.mark.parametrize(
    "told",
    [
        [{"type": "constexpr_lut_to_dense", "inputs": [], "outputs": [], "integers": {}}],
        ["fp16", [-1], "array000000"],
        ["fp16", [float("inf")], "array000000"],
        ["uint1", [1 << 40], "array000000"],
        ["fp16", [3], "array000000"],
        [None],
    ],
)
def test_metadata_of_another_shape_is_one_line(tmp_path: Path, told: object) -> None:
    from ane_moe.emit.coreai.asset import read_weights, stamp_asset

    path = tmp_path / "a.aimodel"
    stamp_asset({"": TEMPLATE}, [("weight", encoded("fp16"))], ContentKey(), path)
    about = json.loads((path / "metadata.json").read_text())
    about["creatorDefinedMetadata"]["ane_moe"]["weights"]["weight"] = told
    (path / "metadata.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="says nothing of its weights"):
        list(read_weights(path))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"creatorDefinedMetadata": []}'])
def test_metadata_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    from ane_moe.emit.coreai.asset import read_asset_key, read_weights, stamp_asset
    from ane_moe.runtime.coreai.runtime import check_asset

    path = tmp_path / "a.aimodel"
    stamp_asset({"": TEMPLATE}, [("weight", encoded("fp16"))], ContentKey(), path)
    (path / "metadata.json").write_text(text)
    assert read_asset_key(path) is None
    with pytest.raises(UserError):
        list(read_weights(path))
    with pytest.raises(UserError):
        check_asset(path)


def test_equal_numbers_in_two_shapes_are_both_read_again(tmp_path: Path) -> None:
    from ane_moe.emit.coreai.asset import read_weights, stamp_asset

    turned = TEXT.replace(f"x{COLUMNS}x", "xCx").replace(f"{ROWS}x", f"{COLUMNS}x")
    turned = turned.replace(f"1x{ROWS}x", f"1x{COLUMNS}x").replace("xCx", f"x{ROWS}x")
    shapes = ((ROWS, COLUMNS, 1, 1), (COLUMNS, ROWS, 1, 1))
    templates = {
        name: Template(text.encode(), {"weight": shape})
        for name, text, shape in zip("ab", (TEXT, turned), shapes, strict=True)
    }
    weight = encoded("fp16")
    values = [("a/weight", weight), ("b/weight", weight.reshape(COLUMNS, ROWS))]
    path = tmp_path / "a.aimodel"
    stamp_asset(templates, values, ContentKey(), path)
    found = dict(read_weights(path))
    assert [found[f"{name}/weight"].shape for name in "ab"] == list(shapes)
    np.testing.assert_array_equal(found["b/weight"].ravel(), weight.ravel())


def test_results_of_calls_are_not_kept(tmp_path: Path) -> None:
    """Core AI itself keeps them for ever: 300 of 64 kB would be 20 MB."""
    from ane_moe.emit.coreai.asset import stamp_asset
    from ane_moe.runtime import load_package

    wide = TEXT.replace(f"x{TOKENS}xf16", "x512xf16")
    path, x = tmp_path / "a.aimodel", np.zeros((1, COLUMNS, 1, 512), np.float16)
    values = [("weight", encoded("fp16"))]
    stamp_asset({"": Template(wide.encode(), TEMPLATE.weights)}, values, ContentKey(), path)
    function, process = load_package(path), psutil.Process()
    for _ in range(20):
        function.predict({"x": x})
    before = process.memory_info().rss
    for _ in range(300):
        function.predict({"x": x})
    assert process.memory_info().rss - before < 5_000_000
