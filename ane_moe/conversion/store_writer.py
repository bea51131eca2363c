"""The store of a layer's experts, written in one pass: one weight in memory at a time."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ane_moe.emit.coreml.package import ContentKey, Weight, Written
from ane_moe.errors import UserError
from ane_moe.expert_record import (
    PLAIN,
    Record,
    Store,
    StoredArray,
    StoreEnd,
    read_end,
)
from ane_moe.files import disk_error, replaced
from ane_moe.formats.encoded import Stored
from ane_moe.hashed_file import HashedFile
from ane_moe.mlprogram.storage import STORAGE, encode


def write_store(
    values: Iterable[tuple[str, Weight]],
    prefixes: Sequence[str],
    key: ContentKey,
    path: Path,
    store: Store,
    name: str = "",
) -> Written:
    """Write the file `path` of the experts called `prefixes`: `values` are their weights, expert by
    expert and in the record's order, as (name, fp16 array or encoded).

    `key` is asked for its digest after the last value was read. Raises UserError when the disk is
    full, and ValueError for weights that are not the record's; an interrupted call leaves nothing
    at `path`. `name` is the writer of `replaced`.
    """
    given = iter(values)
    try:
        with replaced(path, name) as temporary, HashedFile(temporary) as file:
            checksums = tuple(
                _write_record(file, _arrays(given, prefix, store.record), store.record)
                for prefix in prefixes
            )
            if next(given, None) is not None:
                raise ValueError("more weights than the experts of the store have")
            end = StoreEnd(key.digest(), checksums)
            file.write(end.as_bytes())
    except OSError as error:
        raise disk_error(error, path) from error
    return Written(end.content_key, {"": file.sha256})


def read_store_key(path: Path, store: Store) -> str | None:
    """The content key of the store at `path`, or None when there is none of this form."""
    try:
        return read_end(path, store).content_key
    except UserError:
        return None


def sound_digest(path: Path, store: Store) -> str | None:
    """The sha256 of the file, read once; None where a record is not what was written."""
    digest, end = hashlib.sha256(), read_end(path, store)
    with path.open("rb", buffering=0) as stream:
        for checksum in end.checksums:
            record = stream.read(store.record.size)
            if zlib.crc32(record) != checksum:
                return None
            digest.update(record)
        digest.update(stream.read())
    return digest.hexdigest()


def _write_record(
    file: HashedFile, arrays: Iterable[tuple[StoredArray, np.ndarray]], record: Record
) -> int:
    """Write one record, its arrays and zeros up to each of them; its CRC-32."""
    end = checksum = 0
    for place, data in arrays:
        for part in (bytes(place.offset - end), data.data):
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        end = place.offset + place.nbytes
    rest = bytes(record.size - end)
    file.write(rest)
    return zlib.crc32(rest, checksum)


def _arrays(
    values: Iterator[tuple[str, Weight]], prefix: str, record: Record
) -> Iterator[tuple[StoredArray, np.ndarray]]:
    """The bytes of each array of a record, from the next of `values`."""
    for weight in record.weights:
        name, value = next(values, ("", np.empty(0)))
        if name != f"{prefix}/{weight.name}":
            raise ValueError(f"weight {name!r} comes where {prefix}/{weight.name} belongs")
        for place, (type_, numbers) in zip(weight.arrays, _stored(value), strict=True):
            if type_ != place.type or numbers.size != place.count:
                raise ValueError(f"{name}: {numbers.size} of {type_} do not fit {place}")
            yield place, encode(STORAGE[type_], numbers)


def _stored(value: Weight) -> list[tuple[str, np.ndarray]]:
    """Storage types and arrays of a weight, in the order of its form."""
    if isinstance(value, np.ndarray):
        return [(PLAIN if value.dtype == np.float16 else str(value.dtype), value)]
    inputs = (part for step in value.expansions for part in step.inputs.values())
    return [(part.type, part.values) for part in inputs if isinstance(part, Stored)]
