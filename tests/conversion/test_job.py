"""A conversion opens its checkpoint once, and the manifest says what is downstream of it would else
guess."""

import json
from collections import Counter

import pytest

from ane_moe.checkpoints import checkpoint as checkpoint_module
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.formats.recipe import FP16, find_recipe
from ane_moe.manifest import read_manifest
from ane_moe.verification.verify import MIN_COSINE, MIN_COSINE_COMPRESSED, verify
from tests.verification.tiny import tiny_checkpoint, tiny_conversion


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("job") / "checkpoint")


@pytest.fixture
def headers_read(monkeypatch):
    """How often the header of each weight file was read."""
    read, counts = checkpoint_module.read_header, Counter()

    def counted(path):
        counts[path] += 1
        return read(path)

    monkeypatch.setattr(checkpoint_module, "read_header", counted)
    return counts


def test_a_conversion_with_everything_opens_its_checkpoint_once(checkpoint, tmp_path, headers_read):
    tiny_conversion(
        checkpoint,
        tmp_path / "out",
        recipe=find_recipe("int8"),
        calibrate="builtin",
        golden=True,
        min_cosine=0.99,
    )
    assert {path: count for path, count in headers_read.items() if path.parent == checkpoint} == {
        checkpoint / "model.safetensors": 1
    }


def test_a_verification_opens_the_checkpoint_once(checkpoint, tmp_path, headers_read):
    out = tiny_conversion(checkpoint, tmp_path / "out")
    headers_read.clear()
    assert verify(out, checkpoint=checkpoint).passed
    assert headers_read == {checkpoint / "model.safetensors": 1}


def test_a_recipe_called_fp16_that_stores_palettes_gets_the_gates_of_what_it_stores(
    checkpoint, tmp_path
):
    (tmp_path / "fp16.toml").write_text('[roles]\ndefault = "lut6"\n')
    recipe = find_recipe(str(tmp_path / "fp16.toml"))
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=recipe, golden=True)
    manifest = read_manifest(out)
    assert manifest.weights == "fp16" and manifest.compressed and manifest.golden_as_stored
    report = verify(out)
    assert {row.min_cosine for row in report.shards} == {MIN_COSINE_COMPRESSED}
    assert report.as_stored is not None
    assert {row.min_cosine for row in report.as_stored.shards} == {MIN_COSINE}


def test_another_recipe_that_stores_fp16_gets_the_gates_of_fp16(checkpoint, tmp_path):
    (tmp_path / "mine.toml").write_text('[roles]\ndefault = "fp16"\n')
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=recipe, golden=True)
    assert not read_manifest(out).compressed and read_manifest(out).golden_as_stored is None
    assert {row.min_cosine for row in verify(out).shards} == {MIN_COSINE}


def test_functions_say_which_experts_they_hold_and_what_a_call_works_through(checkpoint, tmp_path):
    out = tiny_conversion(
        checkpoint,
        tmp_path / "out",
        recipe=find_recipe("int8"),
        routing="sparse",
        experts_per_function=3,
        expert_tokens=(1, 4),
    )
    (shard,) = read_manifest(out).shards_of("experts", 0)
    matrix = 24 * 24  # square experts: gate, up and down
    for function in shard.functions:
        size = len(function.experts)
        assert function.elements == 3 * matrix * size and function.rate == "int8"
        assert function.weight_bytes == size * 3 * (matrix + 2 * 24)  # a scale for each row
    assert {function.experts for function in shard.functions} == {(0, 1, 2), (3,)}
    assert shard.weight_bytes == sum(
        functions[0].weight_bytes for functions in shard.copies.values()
    )


def test_a_conversion_of_another_version_is_refused_with_the_way_on(checkpoint, tmp_path):
    out = tiny_conversion(checkpoint, tmp_path / "out")
    meta = out / "runtime_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 1}))
    with pytest.raises(
        UserError, match=r"another version; found: format 1, not 3; convert again.*--overwrite"
    ):
        read_manifest(out)


def test_a_conversion_of_another_version_can_be_replaced(checkpoint, tmp_path):
    out = tiny_conversion(checkpoint, tmp_path / "out")
    meta = out / "runtime_meta.json"
    document = json.loads(meta.read_text())
    meta.write_text(json.dumps(document | {"format": 1, "source": {"options": "of then"}}))
    with pytest.raises(UserError, match=r"another conversion.*--overwrite"):
        tiny_conversion(checkpoint, out)
    assert meta.exists()
    convert(checkpoint, out, ConvertOptions(prefill=0, recipe=FP16), overwrite=True)
    assert json.loads(meta.read_text()) == document
