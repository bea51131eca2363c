from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ane_moe.mlprogram.blob
from ane_moe.coreml_tools import BlobWriter, ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.blob import HEADER, METADATA, SENTINEL, BlobFile
from ane_moe.mlprogram.storage import STORAGE, decode, stored_size

types = ct.converters.mil.mil.types

# storage type -> (numpy type coremltools' writer takes, its method)
WRITERS = {
    "fp32": (np.float32, "write_float_data"),
    "int8": (np.int8, "write_int8_data"),
    "uint8": (np.uint8, "write_uint8_data"),
    "int16": (np.int16, "write_int16_data"),
    "uint16": (np.uint16, "write_uint16_data"),
    "int32": (np.int32, "write_int32_data"),
    "uint32": (np.uint32, "write_uint32_data"),
    "int4": (types.np_int4_dtype, "write_int4_data"),
    "uint1": (types.np_uint1_dtype, "write_uint1_data"),
    "uint2": (types.np_uint2_dtype, "write_uint2_data"),
    "uint3": (types.np_uint3_dtype, "write_uint3_data"),
    "uint4": (types.np_uint4_dtype, "write_uint4_data"),
    "uint6": (types.np_uint6_dtype, "write_uint6_data"),
}


def _values(name: str, count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if name == "fp32":
        return random.standard_normal(count, np.float32)
    bits, signed = STORAGE[name].bits, STORAGE[name].signed
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    return random.integers(low, high, count)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(WRITERS)), st.integers(1, 200)), min_size=1, max_size=5
    ),
    st.integers(0),
)
def test_every_storage_type_reads_back_what_coremltools_wrote(tmp_path_factory, stored, seed):
    path = tmp_path_factory.mktemp("blob") / "weight.bin"
    writer = BlobWriter(str(path))
    written = []
    for name, count in stored:
        dtype, method = WRITERS[name]
        values = _values(name, count, seed)
        written.append((name, values, getattr(writer, method)(values.astype(dtype))))
    del writer
    blob = BlobFile(path)
    for name, values, offset in written:
        entry = blob.entry(offset, STORAGE[name], len(values))
        np.testing.assert_array_equal(blob.read(entry), values)


def test_fp16_reads_back_what_coremltools_wrote(tmp_path):
    values = np.random.default_rng(0).standard_normal(37).astype(np.float16)
    writer = BlobWriter(str(tmp_path / "weight.bin"))
    offset = writer.write_fp16_data(values.view(np.uint16))
    del writer
    blob = BlobFile(tmp_path / "weight.bin")
    read = blob.read(blob.entry(offset, STORAGE["fp16"], 37))
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8e4m3fn", torch.float8_e4m3fn), ("fp8e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)],
)
def test_all_codes_of_small_floats_decode_as_torch_does(name, dtype):
    codes = np.arange(1 << STORAGE[name].bits, dtype=STORAGE[name].stored)
    expected = (
        torch.from_numpy(codes.view(np.int16 if name == "bf16" else np.uint8))
        .view(dtype)
        .float()
        .numpy()
    )
    decoded = decode(STORAGE[name], codes.view(np.uint8), len(codes)).astype(np.float32)
    np.testing.assert_array_equal(decoded, expected)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int4", "uint1", "uint2", "uint3", "uint4", "uint6"]),
    st.integers(0, 300),
    st.integers(0),
)
def test_packed_elements_unpack_as_coremltools_unpacks_them(name, count, seed):
    storage = STORAGE[name]
    raw = np.random.default_rng(seed).integers(0, 256, stored_size(storage, count), np.uint8)
    expected = ct.optimize._utils.restore_elements_from_packed_bits(
        raw, storage.bits, count, storage.signed
    )
    np.testing.assert_array_equal(decode(storage, raw, count), expected)


def _file(path: Path, nbytes: int = 32, offset: int = 128, **changed: int) -> BlobFile:
    """A file with one fp16 constant of 16 elements, parts of it changed."""
    fields = {
        "version": 2,
        "sentinel": SENTINEL,
        "code": 1,
        "nbytes": nbytes,
        "offset": offset,
        "padding": 0,
    } | changed
    header = HEADER.pack(1, fields["version"])
    metadata = METADATA.pack(
        *(fields[name] for name in ("sentinel", "code", "nbytes", "offset", "padding"))
    )
    path.write_bytes(header + metadata + bytes(32))
    return BlobFile(path)


DAMAGE = {
    "version": (1, "version 2"),
    "sentinel": (0, "no metadata"),
    "code": (99, "unknown storage type"),
    "nbytes": (2**62, "declared size"),
    "offset": (2**63, "outside the file"),
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *case) for name, case in DAMAGE.items()]
)
def test_damaged_metadata_is_one_clear_error(tmp_path, name, value, message):
    with pytest.raises(UserError, match=message):
        _file(tmp_path / "weight.bin", **{name: value}).entry(64, STORAGE["fp16"], 16)


@pytest.mark.parametrize(
    ("metadata_offset", "dtype", "count", "message"),
    [
        (65, "fp16", 16, "metadata slot"),
        (0, "fp16", 16, "metadata slot"),
        (128, "fp16", 16, "metadata slot"),
        (2**64 - 64, "fp16", 16, "metadata slot"),
        (64, "fp32", 8, "not stored as the program declares"),
        (64, "fp16", 17, "declared size"),
        (64, "fp16", 2**60, "declared size"),
    ],
)
def test_a_constant_that_does_not_match_the_program_is_refused(
    tmp_path, metadata_offset, dtype, count, message
):
    with pytest.raises(UserError, match=message):
        _file(tmp_path / "weight.bin").entry(metadata_offset, STORAGE[dtype], count)


@pytest.mark.parametrize("size", [0, 10, 63])
def test_a_file_without_a_header_is_refused(tmp_path, size):
    path = tmp_path / "weight.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(UserError, match="no header"):
        BlobFile(path)


def test_data_cut_short_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "weight.bin"
    _file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="outside the file"):
        BlobFile(path).entry(64, STORAGE["fp16"], 16)


def test_wrong_padding_of_packed_elements_is_refused(tmp_path):
    path = tmp_path / "weight.bin"
    path.write_bytes(HEADER.pack(1, 2) + METADATA.pack(SENTINEL, 8, 2, 128, 3) + bytes(2))
    with pytest.raises(UserError, match="padding"):
        BlobFile(path).entry(64, STORAGE["int4"], 3)


def test_views_stay_valid_when_later_reads_push_their_pages_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ane_moe.mlprogram.blob, "MAX_RESIDENT_BYTES", 64)
    path = tmp_path / "weight.bin"
    values = np.arange(16, dtype=np.float16)
    path.write_bytes(HEADER.pack(1, 2) + METADATA.pack(SENTINEL, 1, 32, 128, 0) + values.tobytes())
    blob = BlobFile(path)
    for read in [blob.read(blob.entry(64, STORAGE["fp16"], 16)) for _ in range(10)]:
        np.testing.assert_array_equal(read, values)
        assert not read.flags.writeable
