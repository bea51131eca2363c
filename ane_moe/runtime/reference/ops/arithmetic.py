"""How sums are accumulated: exactly (fp32), or the way a narrow accumulator would."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

# Terms an fp16 accumulator is assumed to add in fp32 before it stores a partial sum in fp16.
RUN = 32


class Arithmetic(Protocol):
    """`as_stored`: products take constant matrices as they are stored. `apart`: and no column of a
    product hangs on another, to the bit."""

    as_stored: ClassVar[bool]
    apart: ClassVar[bool]

    def at(self, op: str, name: str) -> "Arithmetic":
        """The same for one operation, by its type and name."""

    def round(self, x: Tensor) -> Tensor:
        """An intermediate result inside an op."""

    def parameter(self, value: float) -> float:
        """A number that an op computes with, such as an epsilon."""

    def sum(self, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        """The sum over `axes`."""

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        """The running sum along `axis`."""

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`, with numpy's broadcasting."""


class Exact:
    """fp32 throughout; integers in their own type."""

    as_stored: ClassVar[bool] = True
    apart: ClassVar[bool] = False

    def at(self, op: str, name: str) -> "Exact":
        return self

    def round(self, x: Tensor) -> Tensor:
        return x

    def parameter(self, value: float) -> float:
        return value

    def sum(self, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        return torch.sum(x, dim=axes, keepdim=keep, dtype=x.dtype) if axes else x

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        return torch.cumsum(x, axis, dtype=x.dtype)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


class Narrow:
    """Every intermediate, every parameter and every partial sum of `RUN` terms is rounded to fp16.

    Values stay in fp32 tensors.
    """

    as_stored: ClassVar[bool] = False
    apart: ClassVar[bool] = False

    def at(self, op: str, name: str) -> "Narrow":
        return self

    def round(self, x: Tensor) -> Tensor:
        return x.half().float() if x.dtype is torch.float32 else x

    def parameter(self, value: float) -> float:
        return torch.tensor(value).half().item()

    def sum(self, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype is not torch.float32 or not axes:
            return Exact().sum(x, axes, keep)
        over = sorted(axis % x.dim() for axis in axes)
        kept = [axis for axis in range(x.dim()) if axis not in over]
        flat = x.permute(*kept, *over).reshape(*(x.shape[axis] for axis in kept), -1)
        total = self._add_up([run.sum(-1) for run in flat.split(RUN, dim=-1)])
        for axis in over if keep else ():
            total = total.unsqueeze(axis)
        return total

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        parts = list(x.split(1, axis))
        for i in range(1, len(parts)):
            parts[i] = self.round(parts[i - 1] + parts[i])
        return torch.cat(parts, axis)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        if x.dim() == 1 or y.dim() == 1 or x.dtype is not torch.float32:
            return Exact().matmul(x, y)
        runs = zip(x.split(RUN, dim=-1), y.split(RUN, dim=-2), strict=True)
        return self._add_up([torch.matmul(a, b) for a, b in runs])

    def _add_up(self, parts: list[Tensor]) -> Tensor:
        total = self.round(parts[0])
        for part in parts[1:]:
            total = self.round(total + self.round(part))
        return total
