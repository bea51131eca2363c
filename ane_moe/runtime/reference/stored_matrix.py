"""Products with constant matrices that stay as they are stored.

A matrix is expanded block by block inside the product, or kept expanded in the same blocks where
there is memory for it: the result is the same to the bit. Numbers of fp16 are kept in fp16, and
widened in a product of many columns. One column of fp16 is multiplied as it is: the time of such a
product is that of reading the matrix. O = rows (outputs), I = columns (inputs), T = columns of the
other factor.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from ane_moe.runtime.memory import Memory
from ane_moe.runtime.reference.stored_rows import Made, Rows, Whole, widened

# Of a block: large enough that its operations outweigh being called, small enough for the caches.
BLOCK_ELEMENTS = 1 << 19
# A block begins at a multiple of so many rows, and none is shorter: with MKL, products of such
# blocks are those of the whole matrix to the bit (tests/runtime/test_stored_matrix.py), but for
# products with rows on some processors: a Xeon with AMX takes another kernel for a narrow block.
STEP = 64


class StoredMatrix:
    """A constant matrix `(O, I)` of numbers of `dtype`, fp16 or fp32, in products."""

    def __init__(
        self, shape: tuple[int, int], source: Rows, memory: Memory, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self._narrow = dtype is torch.float16
        self._source = source
        self._memory = memory
        self._kept: tuple[Tensor, ...] = ()
        self._used = 0
        self._measures = False
        self.row_norms: Tensor | None = None  # fp32 (O,), from the first product after `measure`
        self._lock = threading.Lock()
        self._cuts = _cuts(*shape, isinstance(source, Made))
        # What lies in the file as it is kept takes no memory of its own.
        self.nbytes = 0 if isinstance(source, Whole) else dtype.itemsize * shape[0] * shape[1]
        memory.expect(self, self.nbytes)

    @property
    def kept_bytes(self) -> int:
        """Memory that it takes now, beside the file."""
        return self.nbytes if self._kept else 0

    def keep(self) -> None:
        """Keep it expanded, if there is memory for it."""
        with self._lock:
            if not self._kept and self._memory.take(self, self.nbytes):
                rows = (self._source.rows(*cut) for cut in self._cuts)
                self._kept = tuple(block.clone() if self.nbytes else block for block in rows)

    def measure(self) -> None:
        """Note the norms of the rows in the next product."""
        self._measures = True

    def measure_now(self) -> None:
        """Find the norms of the rows."""
        self.measure()
        for _ in self._blocks():
            pass

    def times(self, columns: Tensor) -> Tensor:
        """`matrix @ columns`: fp16 or fp32 `(I, T) -> (O, T)`, or `(N, I, T) -> (N, O, T)`.

        Sums are fp32, and so is the result but for one column of fp16 times numbers of fp16, whose
        sums are rounded to fp16 at once.
        """
        if columns.dim() > 2:
            wide = columns.float()
            return torch.cat([torch.matmul(widened(one), wide) for one in self._blocks()], -2)
        if self._is_one(columns.shape[1], columns.dtype):
            return self._by_column(columns.flatten()).unsqueeze(1)
        y, wide = torch.empty(self.shape[0], columns.shape[1]), columns.float()
        for (first, last), block in zip(self._cuts, self._blocks(), strict=True):
            torch.mm(widened(block), wide, out=y[first:last])
        return y

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows one after the other, as fp32."""
        for (first, last), block in zip(self._cuts, self._blocks(), strict=True):
            yield slice(first, last), widened(block)

    def applied(self, x: Tensor) -> Tensor:
        """`x @ matrix.T`: fp16 or fp32 `(..., I) -> (..., O)`, of the type that `times` gives."""
        flat = x.reshape(-1, x.shape[-1])
        if self._is_one(len(flat), x.dtype):
            return self._by_column(flat[0]).view(*x.shape[:-1], -1)
        wide = flat.float()
        if len(self._cuts) == 1:
            y = torch.mm(wide, widened(next(self._blocks())).T)
        else:
            y = torch.empty(len(flat), self.shape[0])
            for (first, last), block in zip(self._cuts, self._blocks(), strict=True):
                torch.mm(wide, widened(block).T, out=y[:, first:last])
        return y.view(*x.shape[:-1], -1)

    def _is_one(self, columns: int, dtype: torch.dtype) -> bool:
        return columns == 1 and self._narrow and dtype is torch.float16

    def _by_column(self, column: Tensor) -> Tensor:
        """fp16 `(I,) -> (O,)`."""
        if len(self._cuts) == 1:
            return torch.mv(next(self._blocks()), column)
        y = torch.empty(self.shape[0], dtype=torch.float16)
        for (first, last), block in zip(self._cuts, self._blocks(), strict=True):
            torch.mv(block, column, out=y[first:last])
        return y

    def _blocks(self) -> Iterator[Tensor]:
        if not self._kept:
            self._used += 1
            if self._used >= self._memory.patience:
                self.keep()
        kept = self._kept
        blocks = iter(kept) if kept else (self._source.rows(*cut) for cut in self._cuts)
        return self._measured(blocks) if self._measures else blocks

    def _measured(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        norms = []
        for block in blocks:
            norms.append(torch.linalg.vector_norm(widened(block), dim=1))
            if len(norms) == len(self._cuts):
                self.row_norms, self._measures = torch.cat(norms), False
            yield block


def _cuts(rows: int, columns: int, whole: bool) -> tuple[tuple[int, int], ...]:
    """First and last row of each block."""
    step = rows if whole else max(STEP, BLOCK_ELEMENTS // max(1, columns) // STEP * STEP)
    starts = range(0, max(1, rows - STEP + 1), max(1, step))
    return tuple(zip(starts, [*starts[1:], rows], strict=True))


class Matrices:
    """The constant matrices of a package, each there once for all its functions."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._found: weakref.WeakValueDictionary[Hashable, StoredMatrix] = (
            weakref.WeakValueDictionary()
        )

    def find(
        self,
        key: Hashable,
        shape: tuple[int, int],
        source: Callable[[], Rows],
        dtype: torch.dtype,
    ) -> StoredMatrix:
        """The matrix that `key` says where and how it is stored."""
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = StoredMatrix(shape, source(), self.memory, dtype)
        return found
