"""Whatever is wrong with the files is named, before any number is computed."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.reader import read_program
from ane_moe.verification.integrity import check_integrity

MOE = "moe/layer_00.mlpackage"
BLOB = f"{MOE}/Data/com.apple.CoreML/weights/weight.bin"
MODEL = f"{MOE}/Data/com.apple.CoreML/model.mlmodel"


def problems(folder):
    return {
        problem.path: problem.what
        for problem in check_integrity(folder, read_manifest(folder), lambda *_: None)
    }


def flip_byte(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))


def edit_manifest(folder, change):
    path = folder / "runtime_meta.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rehash(folder, *relatives):
    """As if the damage had been done by the conversion itself."""

    def change(data):
        for relative in relatives:
            data["files"][relative] = hashlib.sha256((folder / relative).read_bytes()).hexdigest()

    edit_manifest(folder, change)


def weight_offset(folder):
    """Where the data of one weight of the MoE shard lies in the blob file."""
    block = read_program(folder / MOE).functions["decode"].block
    return next(
        op.attributes["val"].blob[1]
        for op in block.operations
        if op.type == "const" and op.attributes["val"].blob is not None and "down" in op.name
    )


def test_a_fresh_conversion_is_sound(conversion):
    assert problems(conversion) == {}


@pytest.mark.parametrize("relative", [BLOB, MODEL, "embed.bin", "golden.safetensors"])
def test_a_flipped_byte_is_found_in_every_kind_of_file(relative, copy):
    folder = copy()
    flip_byte(folder / relative)
    assert list(problems(folder)) == [relative] and "sha256" in problems(folder)[relative]


def test_a_truncated_blob_is_found_even_with_its_own_hash(copy):
    folder = copy()
    data = (folder / BLOB).read_bytes()
    (folder / BLOB).write_bytes(data[: len(data) // 2])
    assert "sha256" in problems(folder)[BLOB]
    rehash(folder, BLOB)
    assert list(problems(folder)) == [MOE]


def test_a_truncated_program_is_found_even_with_its_own_hash(copy):
    folder = copy()
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: len(data) // 2])
    rehash(folder, MODEL)
    assert list(problems(folder)) == [MOE]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(value, copy):
    folder = copy()
    offset = weight_offset(folder)
    with (folder / BLOB).open("r+b") as file:
        file.seek(offset)
        file.write(np.float16(value).tobytes())
    rehash(folder, BLOB)
    assert list(problems(folder)) == [MOE]
    assert "NaN or Inf in weight" in problems(folder)[MOE] and "down" in problems(folder)[MOE]


def test_an_embedding_that_is_not_finite_is_named(copy):
    folder = copy()
    table = np.fromfile(folder / "embed.bin", np.float16)
    table[100] = np.nan
    table.tofile(folder / "embed.bin")
    rehash(folder, "embed.bin")
    assert "NaN" in problems(folder)["embed.bin"]


def test_an_embedding_table_of_another_size_is_named(copy):
    folder = copy()
    (folder / "embed.bin").write_bytes((folder / "embed.bin").read_bytes()[:-2])
    rehash(folder, "embed.bin")
    assert "bytes" in problems(folder)["embed.bin"]


def test_a_missing_shard_is_named_file_by_file(copy):
    folder = copy()
    shutil.rmtree(folder / MOE)
    assert problems(folder)[BLOB] == "missing" and all(
        path.startswith(MOE) for path in problems(folder)
    )


def test_an_extra_shard_is_named(copy):
    folder = copy()
    shutil.copytree(folder / MOE, folder / "moe/layer_07.mlpackage")
    assert all(
        path.startswith("moe/layer_07") and "extra" in what
        for path, what in problems(folder).items()
    )


def test_files_that_a_file_browser_leaves_are_no_problem(copy):
    folder = copy()
    for place in (".", "moe", MOE, f"{MOE}/Data"):
        (folder / place / ".DS_Store").write_bytes(b"Bud1")
    assert problems(folder) == {}


def test_an_extra_file_inside_a_package_is_named(copy):
    folder = copy()
    (folder / MOE / "Data/more.bin").write_bytes(b"x")
    assert list(problems(folder)) == [f"{MOE}/Data/more.bin"]


def test_a_note_beside_the_shards_is_not_our_business(copy):
    folder = copy()
    (folder / "NOTES.md").write_text("mine")
    assert problems(folder) == {}


def test_a_manifest_that_forgets_a_shard_is_incomplete(copy):
    folder = copy()
    edit_manifest(
        folder, lambda data: data.update(shards=[s for s in data["shards"] if s["path"] != MOE])
    )
    assert "layer 0" in problems(folder)["runtime_meta.json"]


def test_a_manifest_that_forgets_the_files_of_a_shard_is_incomplete(copy):
    folder = copy()
    edit_manifest(
        folder,
        lambda data: data.update(
            files={
                path: digest for path, digest in data["files"].items() if not path.startswith(MOE)
            }
        ),
    )
    assert "no file of it is listed" in problems(folder)[MOE]
