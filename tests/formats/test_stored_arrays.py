"""What a store is laid out by, against what the formats encode; and what the host expands of it,
against the runtime's own operations."""

import numpy as np
import pytest

from ane_moe.errors import UserError
from ane_moe.expert_record import StoredArray, StoredWeight, lay_out
from ane_moe.formats.as_stored import Codes
from ane_moe.formats.encoded import Stored
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format
from ane_moe.formats.stored_arrays import stored_arrays
from ane_moe.loop.expert_expansion import expand as expand_stored
from ane_moe.mlprogram.storage import STORAGE, encode

FORMATS = [
    "fp16",
    "int8",
    "int4-channel",
    "int8-block32",
    "int4-block32",
    "lut2",
    "lut3",
    "lut4",
    "lut6",
    "lut8",
    "lut4-g8",
    "lut4-tensor",
    "lut4+scale",
    "apple2",
    "apple2-g16",
]
SHAPES = ((64, 96), (40, 72), (130, 32))  # the second has rows of 3 and 6 bits that share a byte


def weight_of(shape):
    return (np.random.default_rng(0).standard_normal(shape) / 8).astype(np.float16)


AS_STORED = [
    "as-stored-int4-1x32",
    "as-stored-int8-1xall",
    "as-stored-int4-zeros-1x8",
    "as-stored-int8-zeros-2x8",
    "as-stored-level4-1x32",
    "as-stored-real4-1x8",
    "as-stored-lut8-2x8",
    "as-stored-lut4-1x32",
    "as-stored-lut6-allxall",
    "as-stored-lut3-1x8",
]


def carried(form, shape):
    """A matrix of codes by chance, as a checkpoint may have it."""
    random, (rows, columns) = np.random.default_rng(0), shape
    down, across = form.height or rows, form.width or columns
    count, blocks = 1 << form.bits, (rows // down, columns // across)
    levels = {"int": np.arange(count) - count / 2, "level": np.arange(count) - 4.0}
    values = levels.get(form.kind, np.sort(random.normal(size=count)).astype(np.float16))
    codes = np.float32(values)[random.integers(0, count, shape)]

    def each(numbers):
        return np.float32(numbers).repeat(down, 0).repeat(across, 1)

    scales = each((random.random(blocks) / 8).astype(np.float16))
    zeros = each(random.integers(-count // 2, count // 2, blocks)) if form.zeros else None
    weight = ((codes - (0 if zeros is None else zeros)) * scales).astype(np.float16)
    return weight, form.carry(weight, Codes(codes, np.float32(values).tolist(), scales, zeros))


CASES = [(name, shape) for name in (*FORMATS, *AS_STORED) for shape in SHAPES]


@pytest.mark.parametrize(
    ("name", "shape"), [case for case in CASES if case[1][1] % 32 == 0 or "x32" not in case[0]]
)
def test_records_hold_what_formats_encode_and_give_what_the_runtime_makes_of_it(name, shape):
    weight, form = weight_of(shape), find_format(name)
    encoded = form.encode(weight) if name in FORMATS else carried(form, shape)[1]
    kind, arrays = stored_arrays(name, *shape)
    record = lay_out([StoredWeight("w", shape, kind, tuple(StoredArray(*one) for one in arrays))])
    (stored,) = record.weights
    given = [("fp16", weight)]
    if encoded is not None:
        parts = (part for step in encoded.expansions for part in step.inputs.values())
        given = [(part.type, part.values) for part in parts if isinstance(part, Stored)]
    assert [(type_, values.size) for type_, values in given] == [
        (array.type, array.count) for array in stored.arrays
    ]
    assert sum(array.nbytes for array in stored.arrays) == form.stored_bytes(*shape)
    buffer, out = np.zeros(record.size, np.uint8), np.zeros(shape, np.float16)
    for (type_, values), array in zip(given, stored.arrays, strict=True):
        buffer[array.bytes] = encode(STORAGE[type_], values)
    expand_stored(stored, buffer, out)
    expected = weight if encoded is None else expand(encoded).reshape(shape)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", ["sparse50", "lut4-v2", "as-stored"])
def test_a_format_that_a_store_does_not_hold_is_refused(name):
    with pytest.raises(UserError, match="store of experts does not hold"):
        stored_arrays(name, 64, 96)
