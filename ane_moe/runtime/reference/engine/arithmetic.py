"""The Neural Engine's arithmetic as a way to accumulate, beside exact sums and narrow ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ane_moe.runtime.reference.engine.fixed_point import LIMIT, dot
from ane_moe.runtime.reference.engine.ledger import NOWHERE, Ledger, Met, Site
from ane_moe.runtime.reference.engine.rounding import LARGEST, decoded, to_fp16
from ane_moe.runtime.reference.ops.arithmetic import Exact
from ane_moe.runtime.reference.stored_matrix import StoredMatrix

EXACT = Exact()


@dataclass(frozen=True)
class Engine:
    """Products in fixed point, everything else rounded to fp16 with halves away from zero.

    With a ledger it also notes what every operation met, at the cost of two more products each.
    """

    as_stored: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    ledger: Ledger | None = None
    site: Site = NOWHERE

    def at(self, op: str, name: str) -> "Engine":
        return Engine(self.ledger, self.site._replace(op=op, name=name))

    def round(self, x: Tensor) -> Tensor:
        return to_fp16(x) if x.dtype is torch.float32 else x

    def parameter(self, value: float) -> float:
        """As it is: an operation that the engine computes rounds its own."""
        return value

    def sum(self, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        """Exact, rounded once: Inf beyond fp16."""
        return self.round(EXACT.sum(x, axes, keep))

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        return self.round(EXACT.cumsum(x, axis))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y` with numpy's broadcasting; whole numbers exactly."""
        if x.dtype is not torch.float32 or y.dtype is not torch.float32:
            return EXACT.matmul(x, y)
        row, column = x.dim() == 1, y.dim() == 1
        left = x[None] if row else x
        right = y[:, None] if column else y
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        lefts = left.expand(*batch, *left.shape[-2:]).reshape(-1, *left.shape[-2:])
        rights = right.expand(*batch, *right.shape[-2:]).reshape(-1, *right.shape[-2:])
        pairs = zip(lefts, rights, strict=True)
        found = torch.stack([self._product(a, b) for a, b in pairs])
        found = found.reshape(*batch, *found.shape[-2:])
        found = found.squeeze(-2) if row else found
        return found.squeeze(-1) if column else found

    def contract(self, w: Tensor | StoredMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`w [M,K] @ x [K,N] + bias [M]`, the bias being where the sum begins. Columns of zeros are
        left out where there is none."""
        x, start = decoded(x), None if bias is None else decoded(bias)
        live = x.any(0)
        if start is not None or bool(live.all()):
            return self._contract(w, x, start)
        y = torch.zeros(w.shape[0], x.shape[1])
        if bool(live.any()):
            y[:, live] = self._contract(w, x[:, live], None)
        return y

    def _contract(self, w: Tensor | StoredMatrix, x: Tensor, start: Tensor | None) -> Tensor:
        if not isinstance(w, StoredMatrix):
            return self._dot(decoded(w), x, start)
        y = torch.empty(w.shape[0], x.shape[1])
        for rows, block in w.blocks():
            y[rows] = self._dot(decoded(block), x, None if start is None else start[rows])
        return y

    def _dot(self, w: Tensor, x: Tensor, start: Tensor | None) -> Tensor:
        sums = dot(w, x, start, count=self.ledger is not None)
        if self.ledger is not None and sums.total.numel():
            met = self.ledger.at(self.site, LIMIT)
            _note_sums(met, w, x, start, sums.total.isinf())
            met.dropped += sums.dropped or 0
            _note_results(met, sums.total)
        return sums.total

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a [M,K] @ b [K,N]`: the side with fewer columns goes column by column."""
        if b.shape[1] > a.shape[0]:
            return self.contract(b.t(), a.t()).t()
        return self.contract(a, b)

    def elementwise(self, y: Tensor, *given: Tensor) -> Tensor:
        """A result of `given` in fp16; what goes beyond, though all that was given is finite, is
        noted."""
        result = to_fp16(y)
        if self.ledger is not None and result.numel():
            met = self.ledger.at(self.site, LARGEST)
            if all(bool(one.isfinite().all()) for one in given):
                met.overflows += int(result.isinf().sum())
            _note_results(met, result)
        return result


def _note_results(met: Met, result: Tensor) -> None:
    finite = result.masked_fill(~result.isfinite(), 0)
    met.results += result.numel()
    met.largest_result = max(met.largest_result, float(finite.abs().max()))


def _note_sums(met: Met, w: Tensor, x: Tensor, bias: Tensor | None, over: Tensor) -> None:
    """How large partial sums are: of the terms at hand in the worst order, and of any terms."""
    begin = torch.zeros(len(w), 1) if bias is None else bias[:, None]
    magnitudes, sums = w.abs() @ x.abs(), w @ x  # (M, N)
    upward = (magnitudes + sums) / 2 + begin.clamp(min=0)
    downward = (magnitudes - sums) / 2 - begin.clamp(max=0)
    partial = torch.maximum(upward, downward)
    met.largest_input = max(met.largest_input, float(x.abs().max()))
    possible = w.abs().sum(1) * met.largest_input + begin[:, 0].abs()
    met.terms = max(met.terms, w.shape[1])
    met.largest_partial = max(met.largest_partial, float(partial.max()))
    met.largest_possible = max(met.largest_possible, float(possible.max()))
    nonzero = (w != 0).float().sum(0) @ (x != 0).float()
    met.products += int(nonzero.double().sum())
    met.overflows += int(over.sum())
    met.on_the_way += int((over & ((sums + begin).abs() < LIMIT)).sum())
    met.at_risk += int((partial >= LIMIT).sum())
