"""How experts lie in a store: a file for each layer, of records of one size, expert e at e * size.

A record holds the weights of one expert one after the other, so that one read fetches it. Arrays
begin at multiples of 64 bytes, records at multiples of a page. After the last record comes a line
of JSON: the content key of the file, and a CRC-32 of each record.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.mlprogram.storage import STORAGE, stored_size

ALIGNMENT = 64
PAGE = 16_384  # Apple's, and a multiple of the blocks of every disk
MAX_RECORD_BYTES = 1 << 32
MAX_END_BYTES = 1 << 24
PLAIN = "fp16"  # the form of a weight that is stored as it is used

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredArray:
    """One array of a weight: what it is to the operation that expands it, its storage type (see
    mlprogram/storage.py), shape, and first byte in the record."""

    key: str
    type: str
    shape: Shape
    offset: int = 0

    @property
    def count(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def nbytes(self) -> int:
        return stored_size(STORAGE[self.type], self.count)

    @property
    def bytes(self) -> slice:
        """Where in the record it lies."""
        return slice(self.offset, self.offset + self.nbytes)


@dataclass(frozen=True)
class StoredWeight:
    """One weight of an expert: the parameter of the graph that it is, the shape that the graph
    takes, and its form: fp16, scaled, palette, scaled_palette or scaled_levels."""

    name: str
    shape: Shape
    form: str
    arrays: tuple[StoredArray, ...]


@dataclass(frozen=True)
class Record:
    """One expert of a store, `size` bytes."""

    size: int
    weights: tuple[StoredWeight, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it lies as a graph takes it."""
        return all(weight.form == PLAIN for weight in self.weights)

    @property
    def expanded(self) -> "Record":
        """The same weights, all of them fp16: what a graph is given."""
        whole = (StoredArray("values", PLAIN, weight.shape) for weight in self.weights)
        weights = zip(self.weights, whole, strict=True)
        return lay_out(StoredWeight(w.name, w.shape, PLAIN, (array,)) for w, array in weights)


@dataclass(frozen=True)
class Store:
    """The experts of a layer: `count` records, and the path of the package whose graph computes
    them."""

    graph: str
    count: int
    record: Record


@dataclass(frozen=True)
class StoreEnd:
    """What stands after the records: the content key, and the CRC-32 of each of them."""

    content_key: str
    checksums: tuple[int, ...]

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def lay_out(weights: Iterable[StoredWeight]) -> Record:
    """The record that holds `weights` in this order; offsets are found here."""
    placed, end = [], 0
    for weight in weights:
        arrays = []
        for array in weight.arrays:
            arrays.append(StoredArray(array.key, array.type, array.shape, end))
            end = rounded_up(end + array.nbytes, ALIGNMENT)
        placed.append(StoredWeight(weight.name, weight.shape, weight.form, tuple(arrays)))
    return Record(rounded_up(end, PAGE), tuple(placed))


def rounded_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def store_of(entry: dict[str, Any]) -> Store:
    """A store as JSON has it (`dataclasses.asdict`). Raises ValueError where its arrays do not lie
    one after the other inside the record, and as JSON that lacks fields does."""
    weights = tuple(
        StoredWeight(
            weight["name"],
            tuple(weight["shape"]),
            weight["form"],
            tuple(
                StoredArray(array["key"], array["type"], tuple(array["shape"]), array["offset"])
                for array in weight["arrays"]
            ),
        )
        for weight in entry["record"]["weights"]
    )
    record = Record(entry["record"]["size"], weights)
    whole = (size for weight in weights for one in weight.arrays for size in one.shape)
    if not all(isinstance(size, int) and size > 0 for size in whole):
        raise ValueError("an array of a store has no size")
    if record != lay_out(weights) or not 0 < record.size <= MAX_RECORD_BYTES:
        raise ValueError(f"records of {record.size} bytes do not hold their arrays")
    return Store(entry["graph"], int(entry["count"]), record)


def read_end(path: Path, store: Store) -> StoreEnd:
    """What stands after the records. Raises UserError for a file that is missing or cut short, and
    for another one."""
    start = store.count * store.record.size
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            text = stream.read(MAX_END_BYTES)
        found = json.loads(text)
        end = StoreEnd(str(found["content_key"]), tuple(map(int, found["checksums"])))
    except OSError as error:
        raise UserError(f"{path} cannot be read", str(error.strerror), "convert again") from None
    except (ValueError, TypeError, KeyError):
        size = path.stat().st_size
        raise UserError(
            f"{path} is damaged or cut short",
            f"{size} bytes, where {start} and a line of checksums were expected",
            "convert again",
        ) from None
    if len(end.checksums) != store.count:
        raise UserError(
            f"{path} holds other experts",
            f"{len(end.checksums)}, not {store.count}",
            "convert again",
        )
    return end
