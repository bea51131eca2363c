"""Stamping: what is bound is what coremltools' own readers find; a package is complete or
absent."""

import errno
import json

import numpy as np
import pytest
from coremltools.converters.mil.frontend.milproto.load import load

from ane_moe.conversion.output_folder import sweep_unfinished
from ane_moe.coreml_tools import Model_pb2, ct
from ane_moe.emit.coreml import package
from ane_moe.emit.coreml.package import (
    CONTENT_KEY,
    MODEL,
    WEIGHTS,
    ContentKey,
    file_hashes,
    read_content_key,
    stamp,
)
from ane_moe.emit.coreml.template import value_name
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.errors import UserError
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.spec import MlpSpec, NormSpec
from ane_moe.model.template_key import TemplateKey


@pytest.fixture(scope="module")
def template():
    return make_template(
        TemplateKey(DenseConfig(16, NormSpec(), MlpSpec(24)), (("decode", 1), ("prefill", 4)))
    )


@pytest.fixture(scope="module")
def values(template):
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float16)
        for name, shape in template.weights.items()
    }


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_coremltools_loads_the_package_and_finds_every_weight_in_both_functions(
    template, values, tmp_path
):
    written = stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "a.mlpackage")
    model = ct.models.MLModel(str(tmp_path / "a.mlpackage"), skip_model_load=True)
    program = load(model.get_spec(), specification_version=9, file_weights_dir=model.weights_dir)
    assert set(program.functions) == {"decode", "prefill"}
    for function in program.functions.values():
        constants = {
            op.outputs[0].name: op.outputs[0].val
            for op in function.operations
            if op.op_type == "const"
        }
        for name, value in values.items():
            np.testing.assert_array_equal(constants[value_name(name)], value)
    assert written.files == file_hashes(tmp_path / "a.mlpackage")


def test_the_functions_share_one_copy_of_the_weights(template, values, tmp_path):
    stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "a.mlpackage")
    stored = sum(value.nbytes for value in values.values())
    weight_bytes = (tmp_path / "a.mlpackage" / WEIGHTS).stat().st_size
    assert weight_bytes < stored + 64 * (2 * len(values) + 1)  # headers and alignment only


def test_the_same_input_gives_the_same_bytes(template, values, tmp_path):
    for name in "ab":
        stamp({"": template}, values.items(), ContentKey("x"), tmp_path / f"{name}.mlpackage")
    assert contents(tmp_path / "a.mlpackage") == contents(tmp_path / "b.mlpackage")


def test_the_package_carries_its_content_key(template, values, tmp_path):
    key = ContentKey("x")
    stamp({"": template}, values.items(), key, tmp_path / "a.mlpackage")
    assert read_content_key(tmp_path / "a.mlpackage") == key.digest()
    assert read_content_key(tmp_path / "nothing.mlpackage") is None
    model = Model_pb2.Model.FromString((tmp_path / "a.mlpackage" / MODEL).read_bytes())
    assert not [name for name in model.description.metadata.userDefined if "date" in name]
    assert model.description.metadata.userDefined[CONTENT_KEY] == key.digest()


def test_the_item_manifest_names_both_items(template, values, tmp_path):
    stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "a.mlpackage")
    manifest = json.loads((tmp_path / "a.mlpackage" / "Manifest.json").read_text())
    paths = {entry["path"] for entry in manifest["itemInfoEntries"].values()}
    assert paths == {"com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"}
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]


def test_a_shared_weight_is_stored_once_and_has_to_fit(template, values, tmp_path):
    first, other, *_ = (name for name in values if values[name].shape == (24, 16, 1, 1))
    rest = [(name, value) for name, value in values.items() if name != other]
    once = tmp_path / "once.mlpackage"
    stamp({"": template}, rest, ContentKey("x"), once, 0, {other: first})
    stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "both.mlpackage")
    sizes = [
        len(contents(folder)["Data/com.apple.CoreML/weights/weight.bin"])
        for folder in (tmp_path / "both.mlpackage", once)
    ]
    assert sizes[0] - sizes[1] == 24 * 16 * 2 + 64  # and what says of it where it lies
    short = next(name for name in values if values[name].size == 16)
    with pytest.raises(ValueError, match="cannot be"):
        stamp(
            {"": template}, rest, ContentKey("x"), tmp_path / "wrong.mlpackage", 0, {other: short}
        )
    assert not (tmp_path / "wrong.mlpackage").exists()


@pytest.mark.parametrize("spoil", ["missing", "twice", "wrong size", "wrong dtype"])
def test_weights_that_do_not_fit_the_template_leave_nothing_behind(
    template, values, tmp_path, spoil
):
    items = list(values.items())
    if spoil == "missing":
        items.pop()
    elif spoil == "twice":
        items.append(items[0])
    elif spoil == "wrong size":
        items[0] = (items[0][0], np.zeros(3, np.float16))
    else:
        items[0] = (items[0][0], items[0][1].astype(np.float32))
    with pytest.raises(ValueError):
        stamp({"": template}, items, ContentKey("x"), tmp_path / "a.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(
    template, values, tmp_path, monkeypatch
):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package.Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "a.mlpackage")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_the_old_package_whole(template, values, tmp_path):
    stamp({"": template}, values.items(), ContentKey("x"), tmp_path / "a.mlpackage")
    before = contents(tmp_path / "a.mlpackage")

    def interrupted():
        yield next(iter(values.items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stamp({"": template}, interrupted(), ContentKey("y"), tmp_path / "a.mlpackage")
    assert contents(tmp_path / "a.mlpackage") == before


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    half = tmp_path / "attn" / ".writing-layer_00.mlpackage" / "Data"
    half.mkdir(parents=True)
    (tmp_path / ".writing-embed.bin").write_bytes(b"x")
    sweep_unfinished(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["attn"]


def test_a_content_key_tells_weights_apart_by_every_bit_and_their_order():
    numbers = np.random.default_rng(0).integers(0, 256, 1 << 17, np.uint8)
    other = numbers.copy()
    other[70_000] ^= 1

    def key(*pieces):
        made = ContentKey("x")
        for piece in pieces:
            made.update(piece)
        return made.digest()

    keys = {key(numbers), key(other), key(numbers, other), key(other, numbers), key(numbers[:-1])}
    assert len(keys) == 5
    assert key(b"short") != key(b"shorT") and key(numbers) == key(numbers.tobytes())
