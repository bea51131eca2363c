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

# The worked examples of the documentation: where a row of two samples, 0 and 1, is read.
DOCUMENTED = {
    ("UNALIGN_CORNERS", 5): [0, 0.1, 0.5, 0.9, 1],
    ("STRICT_ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
    ("ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
    ("DEFAULT", 5): [0, 0.4, 0.8, 1, 1],
    ("OFFSET_CORNERS", 5): [0.1, 0.3, 0.5, 0.7, 0.9],
    ("UNALIGN_CORNERS", 6): [0, 0, 1 / 3, 2 / 3, 1, 1],
    ("DEFAULT", 6): [0, 1 / 3, 2 / 3, 1, 1, 1],
    ("STRICT_ALIGN_CORNERS", 6): [0, 0.2, 0.4, 0.6, 0.8, 1],
    ("OFFSET_CORNERS", 6): [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12],
    ("ALIGN_CORNERS", 1): [0.5],
    ("STRICT_ALIGN_CORNERS", 1): [0],
}


@pytest.mark.parametrize("mode, count", sorted(DOCUMENTED))
def test_a_sampling_mode_reads_where_the_documentation_says(mode: str, count: int) -> None:
    row = np.array([0, 1], np.float32).reshape(1, 1, 1, 2)
    expected = np.array(DOCUMENTED[mode, count], np.float32).reshape(1, 1, 1, count)
    (out,) = run(
        "resize_bilinear",
        {"x": row},
        {"target_size_height": 1, "target_size_width": count, "sampling_mode": mode},
    )
    assert_same(out, expected, atol=1e-6)
    (newer,) = run(
        "resize",
        {"x": row},
        {
            "shape": [1, count],
            "resized_dims": np.uint32(2),
            "sampling_mode": mode,
            "interpolation_mode": "LINEAR",
        },
    )
    assert_same(newer, expected, atol=1e-6)


@given(
    x=tensors((np.float32,), low=4, high=4, smallest=2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
@QUICK
def test_resizing_by_lines_agrees_with_pytorch(x: np.ndarray, height: int, width: int) -> None:
    for mode, corners in (("UNALIGN_CORNERS", False), ("STRICT_ALIGN_CORNERS", True)):
        expected = F.interpolate(
            torch.from_numpy(x), (height, width), mode="bilinear", align_corners=corners
        ).numpy()
        (out,) = run(
            "resize_bilinear",
            {"x": x},
            {"target_size_height": height, "target_size_width": width, "sampling_mode": mode},
        )
        assert_same(out, expected, rtol=1e-4, atol=1e-4)


@given(
    x=tensors((np.float32,), low=4, high=4, smallest=2),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
@QUICK
def test_the_nearest_neighbour_agrees_with_pytorch(x: np.ndarray, height: int, width: int) -> None:
    expected = F.interpolate(torch.from_numpy(x), (height, width), mode="nearest").numpy()
    (out,) = run(
        "resize_nearest_neighbor",
        {"x": x},
        {"target_size_height": height, "target_size_width": width},
    )
    assert_same(out, expected)


def test_the_newer_resize_reads_the_pixel_nearest_to_the_position() -> None:
    def resized(count: int, size: int) -> list[float]:
        row = np.arange(size, dtype=np.float32).reshape(1, 1, size)
        params = {
            "shape": [0, count],
            "resized_dims": np.uint32(2),
            "interpolation_mode": "NEAREST_NEIGHBOR",
        }
        return run("resize", {"x": row}, params)[0].ravel().tolist()

    assert resized(3, 2) == [0, 1, 1]  # what coremltools' tests of the op expect
    doubled = F.interpolate(torch.arange(3.0).reshape(1, 1, 3), 6, mode="nearest").ravel().tolist()
    assert resized(6, 3) == doubled
    for count in (1, 4, 7):
        positions = np.arange(count) * 5 / count
        assert np.abs(np.array(resized(count, 5)) - positions).max() <= 0.5


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_upsampling_agrees_with_pytorch(scale: int) -> None:
    x = values((1, 2, 3, 4), np.float32, 0)
    factors = {"scale_factor_height": scale, "scale_factor_width": scale + 1}
    size = (3 * scale, 4 * (scale + 1))
    tensor = torch.from_numpy(x)
    assert_same(
        run("upsample_nearest_neighbor", {"x": x}, factors)[0], F.interpolate(tensor, size).numpy()
    )
    for corners in (True, False):
        expected = F.interpolate(tensor, size, mode="bilinear", align_corners=corners).numpy()
        for target in (ct.target.iOS15, ct.target.iOS16):
            (out,) = run(
                "upsample_bilinear", {"x": x}, {**factors, "align_corners": corners}, target
            )
            assert_same(out, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_documented_is_refused() -> None:
    with pytest.raises(UserError, match=r"op resize.*not documented"):
        run(
            "resize",
            {"x": np.ones((1, 1, 2, 2), np.float32)},
            {
                "shape": [4, 4],
                "resized_dims": np.uint32(2),
                "interpolation_mode": "NEAREST_NEIGHBOR",
                "sampling_mode": "OFFSET_CORNERS",
            },
        )


@pytest.mark.parametrize("block", [2, 3])
def test_pixel_shuffle_agrees_with_pytorch_and_unshuffle_undoes_it(block: int) -> None:
    x = values((2, 4 * block * block, 3, 5), np.float32, 0)
    (out,) = run("pixel_shuffle", {"x": x}, {"upscale_factor": block})
    assert_same(out, F.pixel_shuffle(torch.from_numpy(x), block).numpy())
    assert_same(run("pixel_unshuffle", {"x": out}, {"downscale_factor": np.uint32(block)})[0], x)


@pytest.mark.parametrize("block", [2, 3])
def test_depth_to_space_has_the_block_before_the_channel_and_space_to_depth_undoes_it(
    block: int,
) -> None:
    x = values((2, 4 * block * block, 3, 5), np.float32, 0)
    regrouped = (
        x.reshape(2, block * block, 4, 3, 5).swapaxes(1, 2).reshape(x.shape)
    )  # channel first, for PyTorch
    (out,) = run("depth_to_space", {"x": x}, {"block_size": block})
    assert_same(out, F.pixel_shuffle(torch.from_numpy(regrouped), block).numpy())
    assert_same(run("space_to_depth", {"x": out}, {"block_size": block})[0], x)


def test_space_to_batch_takes_every_nth_pixel_and_batch_to_space_undoes_it() -> None:
    x = values((2, 3, 4, 6), np.float32, 0)
    paddings = np.array([[1, 1], [0, 2]], np.int32)
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (0, 2)])
    expected = np.concatenate([padded[:, :, i::3, j::2] for i in range(3) for j in range(2)])
    (out,) = run("space_to_batch", {"x": x}, {"block_shape": [3, 2], "paddings": paddings})
    assert_same(out, expected)
    assert_same(run("batch_to_space", {"x": out}, {"block_shape": [3, 2], "crops": paddings})[0], x)
