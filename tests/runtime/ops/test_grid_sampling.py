"""Sampled images, against PyTorch's and the examples that coremltools publishes."""

from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_harness import assert_same, run
from strategies import QUICK, tensors, values

from ane_moe.errors import UserError

OLD, MIDDLE, NEW = ct.target.iOS15, ct.target.iOS16, ct.target.iOS17
# padding of the op -> padding and align_corners of PyTorch, whose reflection depends on the latter
PADDING = [
    ("constant", "zeros", True),
    ("constant", "zeros", False),
    ("border", "border", True),
    ("border", "border", False),
    ("reflection", "reflection", True),
    ("symmetric", "reflection", False),
]
FOUR = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)


def resample(x: np.ndarray, points: np.ndarray, target: Any = NEW, **params: Any) -> np.ndarray:
    defaults = {
        "sampling_mode": "bilinear",
        "padding_mode": "constant",
        "padding_value": x.dtype.type(0),
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": True,
    }
    (out,) = run("resample", {"x": x, "coordinates": points}, defaults | params, target)
    return out


@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding, theirs, corners", PADDING)
@given(x=tensors((np.float32,), low=4, high=4), seed=st.integers(0, 999))
@QUICK
def test_resampling_agrees_with_grid_sample(
    sampling: str, padding: str, theirs: str, corners: bool, x: np.ndarray, seed: int
) -> None:
    points = values((x.shape[0], 3, 2, 2), np.float32, seed, 1.5)
    expected = F.grid_sample(
        torch.from_numpy(x), torch.from_numpy(points), sampling, theirs, corners
    ).numpy()
    ours = resample(x, points, sampling_mode=sampling, padding_mode=padding, align_corners=corners)
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("corners", [True, False])
def test_the_three_ways_to_give_coordinates_read_the_same_pixels(corners: bool) -> None:
    x, points = values((2, 3, 4, 5), np.float32, 0), values((2, 3, 2, 2), np.float32, 1, 0.8)
    sizes = np.array([5, 4], np.float32)  # x, then y
    pixels = (points + 1) / 2 * (sizes - 1) if corners else ((points + 1) * sizes - 1) / 2
    expected = resample(x, points, align_corners=corners)
    for mode, given_points in (
        ("normalized_zero_to_one", (points + 1) / 2),
        ("unnormalized", pixels),
    ):
        ours = resample(
            x, given_points.astype(np.float32), coordinates_mode=mode, align_corners=corners
        )
        assert_same(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_padding_value_is_blended_in_at_the_edge() -> None:
    x = np.array([11, 22, 33, 44], np.float32).reshape(1, 1, 2, 2)
    points = np.array([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2], np.float32).reshape(1, 2, 2, 2)
    ours = resample(x, points, padding_value=np.float32(6.17))
    assert_same(
        ours.ravel(), np.array([8.585, 6.17, 27.5, 6.17], np.float32), atol=1e-5
    )  # coremltools' example


def test_whole_coordinates_and_fp16_images_are_taken() -> None:
    x, points = values((1, 2, 3, 3), np.float16, 0), np.array([[[[0, 2], [1, 1]]]], np.int32)
    ours = resample(x, points, coordinates_mode="unnormalized")
    assert ours.dtype == np.float16
    assert_same(ours[0, :, 0], np.stack([x[0, :, 2, 0], x[0, :, 1, 1]], -1))


@given(
    x=tensors((np.float32,), low=4, high=4),
    height=st.integers(2, 5),
    width=st.integers(2, 5),
    shared=st.booleans(),
)
@QUICK
def test_an_affine_map_agrees_with_pytorch(
    x: np.ndarray, height: int, width: int, shared: bool
) -> None:
    matrix = values((1 if shared else x.shape[0], 6), np.float32, height, 0.7)
    theta = torch.from_numpy(matrix.reshape(-1, 2, 3)).expand(x.shape[0], -1, -1)
    grid = F.affine_grid(theta, [*x.shape[:2], height, width], align_corners=True)
    expected = F.grid_sample(torch.from_numpy(x), grid, align_corners=True).numpy()
    (out,) = run(
        "affine",
        {"x": x, "transform_matrix": matrix},
        {
            "output_height": height,
            "output_width": width,
            "sampling_mode": "bilinear",
            "padding_mode": "constant",
            "padding_value": np.float32(0),
            "coordinates_mode": "normalized_minus_one_to_one",
            "align_corners": True,
        },
        OLD,
    )
    assert_same(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "box, height, width, expected",
    [  # coremltools' examples of the op
        ([1, 1, 2, 2], 2, 2, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 1, 1, [8.5]),
        ([2, 2, 1, 1], 2, 2, [11, 10, 7, 6]),
    ],
)
def test_a_crop_is_what_coremltools_examples_say(
    box: list, height: int, width: int, expected: list
) -> None:
    params = {"target_height": height, "target_width": width, "sampling_mode": "ALIGN_CORNERS"}
    roi = np.array(box, np.float32).reshape(1, 1, 4, 1, 1)
    (out,) = run("crop_resize", {"x": FOUR, "roi": roi}, params, OLD)
    assert out.shape == (1, 1, 1, height, width)
    assert_same(out.ravel(), np.array(expected, np.float32))
    (newer,) = run("crop_resize", {"x": FOUR, "boxes": np.array([box], np.float32)}, params, NEW)
    assert_same(newer.ravel(), np.array(expected, np.float32))


def test_what_lies_outside_the_image_is_the_padding_value() -> None:
    boxes = np.array([[0.1, 0.3, 1.3, 1], [0.5, 1.8, 1.0, 0.3], [0, 0.4, 0.6, 0.7]], np.float32)
    expected = np.array([3.1, 5.2, 10, 10, 10, 7.9, 10, 13.9, 2.2, 3.1, 9.4, 10.3], np.float32)
    params = {
        "target_height": 2,
        "target_width": 2,
        "normalized_coordinates": True,
        "pad_value": np.float32(10),
        "sampling_mode": "ALIGN_CORNERS",
    }
    roi = np.concatenate([np.zeros((3, 1), np.float32), boxes], 1).reshape(3, 1, 5, 1, 1)
    assert_same(
        run("crop_resize", {"x": FOUR, "roi": roi}, params, MIDDLE)[0].ravel(), expected, atol=1e-5
    )
    named = {"x": FOUR, "boxes": boxes, "box_indices": np.zeros(3, np.int32)}
    assert_same(run("crop_resize", named, params, NEW)[0].ravel(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["DEFAULT", "UNALIGN_CORNERS", "OFFSET_CORNERS", "ALIGN_CORNERS"])
def test_a_box_around_the_whole_image_is_a_bilinear_resize(mode: str) -> None:
    x = values((2, 3, 4, 5), np.float32, 0)
    size = {"height": 3, "width": 7}
    (expected,) = run(
        "resize_bilinear",
        {"x": x},
        {f"target_size_{k}": v for k, v in size.items()} | {"sampling_mode": mode},
    )
    for box_mode, box in (
        ("CORNERS_HEIGHT_FIRST", [0, 0, 3, 4]),
        ("CORNERS_WIDTH_FIRST", [0, 0, 4, 3]),
        ("CENTER_SIZE_HEIGHT_FIRST", [1.5, 2, 3, 4]),
        ("CENTER_SIZE_WIDTH_FIRST", [2, 1.5, 4, 3]),
    ):
        params = {f"target_{k}": v for k, v in size.items()} | {
            "sampling_mode": mode,
            "box_coordinate_mode": box_mode,
        }
        boxes = np.array([box, box], np.float32) * 2
        (out,) = run(
            "crop_resize",
            {"x": x, "boxes": boxes},
            params | {"spatial_scale": np.float32(0.5)},
            NEW,
        )
        assert_same(out, expected, rtol=1e-5, atol=1e-5)


def test_every_region_is_cut_from_every_image() -> None:
    x = values((2, 3, 4, 5), np.float32, 0)
    roi = np.array([[1, 1, 2, 3], [0, 2, 3, 4], [2, 0, 3, 2]], np.float32).reshape(3, 1, 4, 1, 1)
    params = {"target_height": 2, "target_width": 3, "sampling_mode": "ALIGN_CORNERS"}
    (out,) = run("crop_resize", {"x": x, "roi": roi}, params, OLD)
    assert out.shape == (3, 2, 3, 2, 3)
    assert_same(out[0], x[:, :, 1:3, 1:4])


def test_a_box_of_no_image_and_an_inverted_one_are_refused() -> None:
    box = np.array([[0, 0, 1, 1]], np.float32)
    with pytest.raises(UserError, match=r"op crop_resize.*box of image 3, of 1"):
        run(
            "crop_resize",
            {"x": FOUR, "boxes": box, "box_indices": np.array([3], np.int32)},
            {},
            NEW,
        )
    with pytest.raises(UserError, match=r"op crop_resize.*not documented with DEFAULT"):
        run("crop_resize", {"x": FOUR, "boxes": box[:, ::-1].copy()}, {}, NEW)
