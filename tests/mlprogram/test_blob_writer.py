"""The weight file, byte for byte as coremltools' own writer makes it."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ane_moe.coreml_tools import BlobReader
from ane_moe.mlprogram.blob_writer import BlobWriter
from ane_moe.mlprogram.storage import STORAGE, decode, encode

libmilstorage = pytest.importorskip("coremltools.libmilstoragepython")
TYPES = ["fp16", "int8", "uint8", "int4", "uint1", "uint2", "uint3", "uint4", "uint6"]


def values_of(type_: str, count: int, seed: int) -> np.ndarray:
    draw, bits = np.random.default_rng(seed), STORAGE[type_].bits
    if type_ == "fp16":
        return draw.standard_normal(count).astype(np.float16)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if type_.startswith("int") else (0, 2**bits)
    return draw.integers(low, high, count).astype(np.int8 if type_.startswith("int") else np.uint8)


@settings(deadline=None, max_examples=30)
@given(
    arrays=st.lists(st.tuples(st.sampled_from(TYPES), st.integers(1, 300)), max_size=6),
    seed=st.integers(0, 9),
)
def test_files_equal_those_of_coremltools(tmp_path_factory, arrays, seed):
    folder = tmp_path_factory.mktemp("blob")
    theirs, write = libmilstorage._BlobStorageWriter(str(folder / "theirs.bin")), None
    with BlobWriter(folder / "ours.bin", len(arrays)) as ours:
        for type_, count in arrays:
            values = values_of(type_, count, seed)
            write = getattr(theirs, f"write_{type_}_data")
            expected = write(values.view(np.uint16) if type_ == "fp16" else values)
            assert ours.add(values, type_) == expected
    del write, theirs
    written = (folder / "ours.bin").read_bytes()
    other = (folder / "theirs.bin").read_bytes()
    assert hashlib.sha256(written).hexdigest() == ours.sha256
    assert written.rstrip(b"\0") == other.rstrip(b"\0") and abs(len(written) - len(other)) < 64


def test_coremltools_reads_what_was_written(tmp_path):
    with BlobWriter(tmp_path / "weight.bin", len(TYPES)) as writer:
        places = {type_: writer.add(values_of(type_, 77, 1), type_) for type_ in TYPES}
    reader = BlobReader(str(tmp_path / "weight.bin"))
    assert np.array_equal(
        np.asarray(reader.read_int8_data(places["int8"])), values_of("int8", 77, 1)
    )
    assert np.array_equal(
        np.asarray(reader.read_uint3_data(places["uint3"])), values_of("uint3", 77, 1)
    )


@pytest.mark.parametrize("type_", TYPES)
def test_packing_is_undone_by_unpacking(type_):
    for count in (1, 7, 8, 9, 64):
        values = values_of(type_, count, count)
        raw = encode(STORAGE[type_], values)
        assert np.array_equal(decode(STORAGE[type_], raw, count), values)


def test_another_dtype_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="float32"),
        BlobWriter(tmp_path / "weight.bin", 1) as writer,
    ):
        writer.add(np.zeros(3, np.float32), "fp16")


@pytest.mark.parametrize("announced", [1, 3])
def test_another_number_of_arrays_than_announced_is_refused(tmp_path, announced):
    with pytest.raises(ValueError), BlobWriter(tmp_path / "weight.bin", announced) as writer:
        for _ in range(2):
            writer.add(np.zeros(3, np.int8), "int8")
