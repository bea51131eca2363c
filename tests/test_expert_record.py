"""Layouts of stored experts, against published ones and by hand."""

import json
from dataclasses import asdict, replace

import pytest

from ane_moe.errors import UserError
from ane_moe.expert_record import (
    Store,
    StoredArray,
    StoredWeight,
    StoreEnd,
    lay_out,
    read_end,
    store_of,
)

GROUP = 64  # weights that share a scale and a bias


def affine(name, rows, columns, bits):
    """A matrix as Flash-MoE stores it: packed codes, bf16 scales and biases."""
    groups = (rows, columns // GROUP)
    arrays = (
        ("data", f"uint{bits}", (rows, columns)),
        ("s", "bf16", groups),
        ("b", "bf16", groups),
    )
    return StoredWeight(name, (rows, columns), "affine", tuple(StoredArray(*a) for a in arrays))


@pytest.mark.parametrize(("bits", "size"), [(4, 7_077_888), (2, 3_932_160)])
def test_records_of_published_layouts_have_their_published_sizes(bits, size):
    """danveloper/flash-moe, Qwen3.5-397B-A17B: experts 4096 -> 1024 -> 4096, nine arrays each."""
    matrices = {"gate": (1024, 4096), "up": (1024, 4096), "down": (4096, 1024)}
    record = lay_out(affine(name, *shape, bits) for name, shape in matrices.items())
    assert record.size == size
    if bits == 4:
        offsets = [array.offset for weight in record.weights for array in weight.arrays]
        one = [0, 2_097_152, 2_097_152 + 131_072]
        assert offsets == [2_359_296 * matrix + start for matrix in range(3) for start in one]
        assert 512 * record.size == 3_623_878_656  # a layer's file


def test_arrays_and_records_begin_where_reading_is_quick():
    weights = [StoredWeight("a", (3, 5), "fp16", (StoredArray("values", "fp16", (3, 5)),))] * 2
    record = lay_out(weights)
    assert [array.offset for weight in record.weights for array in weight.arrays] == [0, 64]
    assert record.size == 16_384
    assert record.is_plain and record.expanded == record


def test_a_store_comes_back_from_json():
    store = Store("experts/graph_00.mlpackage", 7, lay_out([affine("up", 64, 128, 2)]))
    assert store_of(json.loads(json.dumps(asdict(store)))) == store


@pytest.mark.parametrize(
    "change",
    [{"offset": 64}, {"offset": -64}, {"shape": [0, 128]}, {"shape": [64, 1 << 20]}, {"type": "x"}],
    ids=str,
)
def test_a_store_whose_arrays_do_not_lie_in_its_records_is_refused(change):
    entry = json.loads(json.dumps(asdict(Store("g", 7, lay_out([affine("up", 64, 128, 2)])))))
    entry["record"]["weights"][0]["arrays"][0].update(change)
    with pytest.raises((ValueError, KeyError)):
        store_of(entry)


def test_the_end_of_a_file_is_read_or_refused(tmp_path):
    store, path = Store("g", 2, lay_out([affine("up", 64, 64, 2)])), tmp_path / "layer_00.bin"
    records, end = bytes(2 * store.record.size), StoreEnd("key", (1, 2))
    path.write_bytes(records + end.as_bytes())
    assert read_end(path, store) == end
    with pytest.raises(UserError, match="holds other experts"):
        path.write_bytes(records + replace(end, checksums=(1,)).as_bytes())
        read_end(path, store)
    for cut in (len(records) - 1, len(records), len(records) + 5):
        path.write_bytes((records + end.as_bytes())[:cut])
        with pytest.raises(UserError, match="cut short"):
            read_end(path, store)
    with pytest.raises(UserError, match="cannot be read"):
        read_end(tmp_path / "absent.bin", store)
