"""Images sampled at coordinates: grids of them, affine maps, boxes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ane_moe.runtime.reference.ops.resizing import GRIDS
from ane_moe.runtime.reference.ops.table import Kernel, Op

# ---- coordinates -> pixels


def _pixels(at: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates as positions in pixels, 0 being the centre of the first one."""
    if mode == "unnormalized":
        return at
    share = (at + 1) / 2 if mode == "normalized_minus_one_to_one" else at
    return share * (size - 1) if align_corners else share * size - 0.5


def _reflected(at: Tensor, low: float, high: float) -> Tensor:
    """`at` folded into [low, high] by mirrors at both ends."""
    if low == high:
        return torch.full_like(at, low)
    span = high - low
    along = (at - low).abs() % (2 * span)
    return low + torch.minimum(along, 2 * span - along)


PADDING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "constant": lambda at, size: at,
    "border": lambda at, size: at.clamp(0, size - 1),
    "reflection": lambda at, size: _reflected(at, 0, size - 1),
    "symmetric": lambda at, size: _reflected(at, -0.5, size - 0.5).clamp(0, size - 1),
}
COORDINATES = ("unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one")


# ---- pixels -> values. P = number of points


def _read(x: Tensor, row: Tensor, column: Tensor, outside: float) -> Tensor:
    """The pixels of `x` `[B,C,H,W]` at whole positions `[B,P]`, `[B,C,P]`."""
    height, width = x.shape[-2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1).to(torch.int64) * width + column.clamp(0, width - 1).to(
        torch.int64
    )
    picked = x.flatten(2).gather(2, flat[:, None].expand(-1, x.shape[1], -1))
    return torch.where(inside[:, None], picked, outside)


def _nearest(x: Tensor, row: Tensor, column: Tensor, outside: float) -> Tensor:
    return _read(x, row.round(), column.round(), outside)


def _bilinear(x: Tensor, row: Tensor, column: Tensor, outside: float) -> Tensor:
    top, left = row.floor(), column.floor()
    down, right = (row - top)[:, None], (column - left)[:, None]
    above = _read(x, top, left, outside) * (1 - right) + _read(x, top, left + 1, outside) * right
    below = (
        _read(x, top + 1, left, outside) * (1 - right)
        + _read(x, top + 1, left + 1, outside) * right
    )
    return above * (1 - down) + below * down


SAMPLING = {"nearest": _nearest, "bilinear": _bilinear}


# ---- ops


def _resample(
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Kernel:
    sample, fold = SAMPLING[sampling_mode.lower()], PADDING[padding_mode.lower()]
    mode = coordinates_mode.lower()
    if mode not in COORDINATES:
        raise ValueError(f"unknown coordinates_mode {coordinates_mode}")

    def kernel(x: Tensor, coordinates: Tensor) -> Tensor:
        points = coordinates.to(torch.float32).flatten(1, 2)
        row, column = (
            fold(_pixels(points[..., axis], size, mode, align_corners), size)
            for axis, size in ((1, x.shape[2]), (0, x.shape[3]))
        )
        return sample(x, row, column, padding_value).unflatten(2, coordinates.shape[1:3])

    return kernel


def _affine(
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Kernel:
    if coordinates_mode.lower() == "unnormalized":
        raise ValueError("an affine map of unnormalized coordinates is not documented")
    resample = _resample(
        sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners
    )
    low = -1.0 if coordinates_mode.lower() == "normalized_minus_one_to_one" else 0.0

    def axis(count: int) -> Tensor:
        """Where the pixels of an output axis are, in normalized coordinates."""
        if align_corners:
            return torch.linspace(low, 1, count)
        return low + (1 - low) * (torch.arange(count) + 0.5) / count

    def kernel(x: Tensor, matrix: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(axis(output_height), axis(output_width), indexing="ij")
        points = torch.stack([columns, rows, torch.ones_like(rows)], -1)  # [H,W,3]
        grid = torch.einsum("hwk,bck->bhwc", points, matrix.reshape(-1, 2, 3))
        return resample(x, grid.expand(x.shape[0], -1, -1, -1))

    return kernel


def _corners(box: list[float], mode: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(first, last) position of a box along height and along width."""
    a, b, c, d = box
    first, last = ((a, b), (c, d)) if mode.endswith("HEIGHT_FIRST") else ((b, a), (d, c))
    if mode.startswith("CORNERS"):
        return (first[0], last[0]), (first[1], last[1])
    (y, x), (height, width) = first, last
    return (y - height / 2, y + height / 2), (x - width / 2, x + width / 2)


def _between(first: float, last: float, count: int, mode: str) -> Tensor:
    """`count` positions, fp64, as `resize_bilinear` samples an axis from `first` to `last`."""
    low, high = min(first, last), max(first, last)
    # coremltools tests one such box, outside the image: that it reads the whole image and that it
    # is mirrored at the edges both give the value expected, and neither is documented.
    if mode not in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS") and last < first:
        raise ValueError(f"a box from {first} to {last} is not documented with {mode}")
    return (first + GRIDS[mode](last - first + 1, count)).clamp(low, high)


BOX_MODES = (
    "CORNERS_HEIGHT_FIRST",
    "CORNERS_WIDTH_FIRST",
    "CENTER_SIZE_HEIGHT_FIRST",
    "CENTER_SIZE_WIDTH_FIRST",
)


@dataclass(frozen=True)
class _Boxes:
    """Crops of images `[1,C,H,W]`, each resized to one size, `[C,target_height,target_width]`.

    Derived classes are makers of ops: the fields are the parameters, an instance is the kernel.
    """

    target_height: int = 1
    target_width: int = 1
    normalized_coordinates: bool = False
    spatial_scale: float = 1.0
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST"
    sampling_mode: str = "DEFAULT"
    pad_value = 0.0  # what lies outside; a parameter where a class declares it

    def __post_init__(self) -> None:
        if self.sampling_mode not in GRIDS:
            raise ValueError(f"unknown sampling_mode {self.sampling_mode}")
        if self.box_coordinate_mode not in BOX_MODES:
            raise ValueError(f"unknown box_coordinate_mode {self.box_coordinate_mode}")

    def crop(self, image: Tensor, box: list[float]) -> Tensor:
        lines, counts = [], (self.target_height, self.target_width)
        for ends, size, count in zip(
            _corners(box, self.box_coordinate_mode), image.shape[2:], counts, strict=True
        ):
            scale = self.spatial_scale * (size - 1 if self.normalized_coordinates else 1)
            lines.append(_between(ends[0] * scale, ends[1] * scale, count, self.sampling_mode))
        row, column = (line.reshape(1, -1) for line in torch.meshgrid(*lines, indexing="ij"))
        height, width = image.shape[2:]
        outside = (row < 0) | (row > height - 1) | (column < 0) | (column > width - 1)
        value = _bilinear(
            image,
            row.float().clamp(0, height - 1),
            column.float().clamp(0, width - 1),
            self.pad_value,
        )
        return torch.where(outside[:, None], self.pad_value, value)[0].unflatten(1, counts)


def _image(x: Tensor, index: float) -> Tensor:
    if not 0 <= index < x.shape[0]:
        raise IndexError(f"box of image {index:g}, of {x.shape[0]}")
    return x[int(index)][None]


class _Regions(_Boxes):
    """`[N,B,C,h,w]`: regions `[N,1,4,1,1]` of every image, or `[N,1,5,1,1]` that name theirs."""

    def __call__(self, x: Tensor, roi: Tensor) -> Tensor:
        regions = roi.flatten(1).tolist()
        if roi.shape[2] == 5:
            crops = [[self.crop(_image(x, region[0]), region[1:])] for region in regions]
        else:
            crops = [[self.crop(image[None], region) for image in x] for region in regions]
        return torch.stack([torch.stack(row) for row in crops])


@dataclass(frozen=True)
class _PaddedRegions(_Regions):
    pad_value: float = 0.0


@dataclass(frozen=True)
class _PaddedBoxes(_Boxes):
    """Box n `[N,4]` is cut from image `box_indices[n]`, n when absent; `[N,C,h,w]`."""

    pad_value: float = 0.0

    def __call__(self, x: Tensor, boxes: Tensor, box_indices: Tensor | None) -> Tensor:
        chosen = range(boxes.shape[0]) if box_indices is None else box_indices.tolist()
        pairs = zip(chosen, boxes.tolist(), strict=True)
        return torch.stack([self.crop(_image(x, index), box) for index, box in pairs])


CENTRED = "a box given by its centre reaches half its size to either side"

OPS = (
    Op(
        "resample",
        _resample,
        "x coordinates",
        note="`nearest` rounds halves to even, as PyTorch does",
    ),
    Op("affine", _affine, "x transform_matrix"),
    Op("crop_resize", _Regions, "x roi", note=f"{CENTRED}; what lies outside is 0"),
    Op("crop_resize", _PaddedRegions, "x roi", since=16, note="what lies outside is pad_value"),
    Op("crop_resize", _PaddedBoxes, "x boxes box_indices?", since=17),
)
