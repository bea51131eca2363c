"""What inputs are taken: other numeric types that hold the values, pixels, and defaults."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from typer.testing import CliRunner

from ane_moe.cli import app
from ane_moe.coreml_tools import Model_pb2, ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Feature, TensorType
from ane_moe.runtime import load_package
from ane_moe.runtime.arrays import random_inputs
from ane_moe.runtime.inputs import check_input, shape_fits
from ane_moe.runtime.interface import LoadedFunction
from tests.runtime.saved_program import saved

Get = Callable[[str], Path]
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")


def taken(dtype: str, given: np.ndarray) -> np.ndarray:
    return check_input(Feature("x", TensorType(dtype, given.shape)), given, "input 'x'")


def image(layout: str, channels: int = 3) -> Feature:
    return Feature("image", TensorType("fp32", (1, channels, 2, 4)), kind="image", layout=layout)


# ---- element types


@pytest.mark.parametrize("declared", ["int8", "int32", "fp16", "fp32"])
@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64, np.uint8, np.int64])
def test_whole_numbers_that_fit_are_taken_in_any_numeric_type(declared: str, given: type) -> None:
    values = [0, 1, 100, 127]
    assert taken(declared, np.array(values, given)).tolist() == values


@pytest.mark.parametrize(
    "declared, value",
    [
        ("int32", 1.5),
        ("int32", np.nan),
        ("int32", np.inf),
        ("int32", 2.0**31),
        ("int32", 2**40),
        ("int8", 128),
        ("int8", -129.0),
        ("fp16", 2049),
        ("fp16", 70000),
        ("fp32", 2**24 + 1),
    ],
)
def test_values_that_the_declared_type_does_not_hold_are_refused_with_the_cast_that_would_do(
    declared: str, value: float
) -> None:
    numpy_name = declared.replace("fp", "float")
    with pytest.raises(
        UserError,
        match=rf"with {value} among its values; it takes {declared}: "
        rf"cast it with \.astype\(numpy\.{numpy_name}\)",
    ):
        taken(declared, np.array([1, value]))


@pytest.mark.parametrize("given", [np.array([True]), np.array([1j]), np.array(["a"])])
def test_what_is_not_a_number_is_refused(given: np.ndarray) -> None:
    with pytest.raises(UserError, match=f"wrong element type; found: {given.dtype}"):
        taken("int32", given)


def test_an_integer_input_may_be_the_float32_that_coremltools_own_tests_send(
    tmp_path: Path,
) -> None:
    specs = [mb.TensorSpec((4, 3)), mb.TensorSpec((2,), dtype=types.int32)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS16)
    def program(x, begin):
        return mb.slice_by_size(x=x, begin=begin, size=[2, 2], name="y")

    package = saved(program, tmp_path / "slice.mlpackage", ct.target.iOS16)
    function = load_package(package, runtime="reference")
    x = np.arange(12).reshape(4, 3)
    for begin in (np.array([1, 1], np.int32), np.array([1, 1], np.float32)):
        assert function.predict({"x": x, "begin": begin})["y"].tolist() == [[4, 5], [7, 8]]


def test_the_declared_shape_the_enumerated_ones_or_the_range_decide_which_shapes_fit() -> None:
    fixed = Feature("x", TensorType("fp32", (1, None)))
    assert shape_fits(fixed, (1, 7))
    assert not shape_fits(fixed, (2, 7)) and not shape_fits(fixed, (1,))
    ranged = Feature("x", TensorType("fp32", (1, 4)), ranges=((1, 1), (2, -1)))
    assert shape_fits(ranged, (1, 900)) and not shape_fits(ranged, (1, 1))
    listed = Feature("x", TensorType("fp32", (1, 4)), shapes=((1, 4), (1, 8)))
    assert shape_fits(listed, (1, 8)) and not shape_fits(listed, (1, 6))


# ---- images

PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)  # height 2, width 4, red green blue


def test_a_picture_is_brought_into_the_layout_of_the_program() -> None:
    rgb, bgr = (check_input(image(layout), PICTURE, "image") for layout in ("RGB", "BGR"))
    assert rgb.shape == bgr.shape == (1, 3, 2, 4) and rgb.dtype == np.float32
    assert rgb[0, :, 1, 3].tolist() == [21, 22, 23] and bgr[0, :, 1, 3].tolist() == [23, 22, 21]
    gray = check_input(image("grayscale", 1), PICTURE[..., 0], "image")
    assert gray[0, 0].tolist() == PICTURE[..., 0].tolist()


def test_pixels_in_the_programs_own_shape_are_taken_as_they_are() -> None:
    pixels = np.full((1, 3, 2, 4), 255, np.uint8)
    assert check_input(image("BGR"), pixels, "image").max() == 255


@pytest.mark.parametrize(
    "given, message",
    [
        (PICTURE.astype(np.float32) * 20, "from 0 to 460; it takes pixels of 0 to 255; a scale"),
        (PICTURE.astype(np.int16) - 1, "values from -1 to 22"),
        (np.full((1, 3, 2, 4), np.nan), "values from nan"),
        (PICTURE[:1], r"wrong shape; found: \[1, 3, 1, 4\]"),
        (PICTURE[..., :2], r"wrong shape; found: \[2, 4, 2\]"),
    ],
)
def test_what_is_no_picture_of_the_declared_size_is_refused(
    given: np.ndarray, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_input(image("RGB"), given, "image")


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.0


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = pixels / 255 - [0, 1, 2], of a BGR image of 2 x 4 and two more sizes."""
    path = tmp_path_factory.mktemp("image") / "scaled.mlpackage"
    sizes = ct.EnumeratedShapes([(1, 3, 2, 4), (1, 3, 4, 4)])
    given = ct.ImageType(
        "image", shape=sizes, scale=1 / 255, bias=[0, -1, -2], color_layout=ct.colorlayout.BGR
    )
    ct.convert(
        torch.jit.trace(Scaled(), torch.zeros(1, 3, 2, 4)),
        inputs=[given],
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return path


def test_the_scale_and_bias_of_an_image_are_part_of_the_program(scaled: Path) -> None:
    function = load_package(scaled, runtime="reference")
    (declared,) = function.inputs
    assert (declared.layout, declared.shapes) == ("BGR", ((1, 3, 2, 4), (1, 3, 4, 4)))
    got = function.predict({"image": PICTURE})["y"]
    bias = np.array([0, 1, 2]).reshape(1, 3, 1, 1)
    expected = PICTURE[..., ::-1].transpose(2, 0, 1)[None] / 255 - bias
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert function.predict({"image": np.zeros((4, 4, 3), np.uint8)})["y"].shape == (1, 3, 4, 4)
    with pytest.raises(UserError, match=r"it takes \[1, 3, 2, 4\] or \[1, 3, 4, 4\]"):
        function.predict({"image": np.zeros((3, 4, 3), np.uint8)})


def test_inspect_shows_the_layout_and_range_of_an_image(scaled: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(scaled)], env={"COLUMNS": "160"}).stdout
    assert "image BGR with pixels 0 to 255, fp32 inside" in shown


def test_pixels_are_drawn_from_their_whole_range(scaled: Path) -> None:
    function = load_package(scaled, runtime="reference")
    drawn = np.stack([random_inputs(function.inputs, seed)["image"] for seed in range(40)])
    assert drawn.min() == 0 and drawn.max() == 255 and np.array_equal(drawn, drawn.round())


# ---- what is not given


@pytest.fixture(scope="module")
def optional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x + bias, where bias is 3 if it is not given."""
    path = tmp_path_factory.mktemp("optional") / "optional.mlpackage"

    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return x + bias

    inputs = [
        ct.TensorType("x", shape=(1, 2)),
        ct.TensorType("bias", shape=(1, 2), default_value=np.full((1, 2), 3, np.float32)),
    ]
    ct.convert(
        torch.jit.trace(Add(), (torch.zeros(1, 2), torch.zeros(1, 2))),
        inputs=inputs,
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return path


def test_an_optional_input_that_is_not_given_has_its_default(optional: Path) -> None:
    function = load_package(optional, runtime="reference")
    assert [feature.default for feature in function.inputs if feature.optional] == [3.0]
    x = np.array([[1, 2]], np.float32)
    assert function.predict({"x": x})["y"].tolist() == [[4, 5]]
    assert function.predict({"x": x, "bias": x})["y"].tolist() == [[2, 4]]
    assert set(random_inputs(function.inputs, 0)) == {"x"}


def test_an_optional_input_without_a_default_must_be_given(optional: Path, tmp_path: Path) -> None:
    function = altered(optional, tmp_path, lambda array: array.ClearField("floatDefaultValue"))
    with pytest.raises(UserError, match="needs input 'bias'; found: inputs: x; it takes fp32"):
        function.predict({"x": np.zeros((1, 2))})


def altered(source: Path, folder: Path, change: Callable[[object], object]) -> LoadedFunction:
    """The function of a package whose array description of `bias` has been changed."""
    path = folder / "altered.mlpackage"
    (path / MODEL).parent.mkdir(parents=True)
    (path / "Manifest.json").write_bytes((source / "Manifest.json").read_bytes())
    model = Model_pb2.Model.FromString((source / MODEL).read_bytes())
    bias = next(item for item in model.description.input if item.name == "bias")
    change(bias.type.multiArrayType)
    (path / MODEL).write_bytes(model.SerializeToString())
    return load_package(path, runtime="reference")


def test_a_missing_input_is_named_with_what_it_takes_and_how_it_is_drawn(package: Get) -> None:
    function = load_package(package("flexible"), runtime="reference")
    with pytest.raises(UserError, match=r"needs input 'x'.*fp16 \[1, 8, 1, 1\.\.16\].*run --seed"):
        function.predict({})
