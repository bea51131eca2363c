"""Lists of tensors: what `make_list` makes and TensorFlow's tensor arrays become."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import sizes

MAX_LENGTH = 1 << 20  # an index may come from anywhere, and a write past the end makes room


@dataclass(frozen=True)
class TensorList:
    """Tensors of one type and shape. An operation gives another list and leaves this one as it is.

    elements: None where nothing was written, which reads as zeros.
    shape: of every element; None until a first one is written.
    grows: whether a write past the end is allowed.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] | None
    grows: bool
    elements: tuple[Tensor | None, ...]

    def read(self, index: int) -> Tensor:
        """Raises UserError for an index out of bounds and for an element of unknown shape."""
        if not 0 <= index < len(self.elements):
            raise UserError(
                "it reads past the end of a list", f"index {index} of {len(self.elements)}"
            )
        element = self.elements[index]
        if element is not None:
            return element
        if self.shape is None:
            raise UserError(
                "it reads a list of unknown shape that nothing was written to", f"index {index}"
            )
        return torch.zeros(self.shape, dtype=self.dtype)

    def gather(self, indices: Sequence[int]) -> Tensor:
        """Elements stacked along a new first axis. Raises UserError as `read` does."""
        if not indices and self.shape is not None:
            return torch.zeros(0, *self.shape, dtype=self.dtype)
        return torch.stack([self.read(index) for index in indices])

    def write(self, indices: Sequence[int], values: Sequence[Tensor]) -> "TensorList":
        """This list with `values` at `indices`, longer where it has to be.

        Raises UserError for what does not fit.
        """
        if len(indices) != len(values):
            raise UserError(
                "it writes another number of values than of indices",
                f"{len(values)} for {len(indices)}",
            )
        if not indices:
            return self
        last = max(indices)
        if min(indices) < 0 or last >= (MAX_LENGTH if self.grows else len(self.elements)):
            raise UserError(
                "it writes outside a list",
                f"index {min(indices)} to {last} of {len(self.elements)}",
            )
        elements = [*self.elements, *[None] * (last + 1 - len(self.elements))]
        shape = self.shape
        for index, value in zip(indices, values, strict=True):
            shape = shape if shape is not None else tuple(value.shape)
            if value.dtype is not self.dtype or value.shape != shape:
                raise UserError(
                    "it writes another type than the list's",
                    f"{value.dtype} {sizes(value.shape)} for {self.dtype} {sizes(shape)}",
                )
            elements[index] = value
        return replace(self, shape=shape, elements=tuple(elements))
