"""Compressed packages: what they hold is read back by coremltools and by the reference runtime, bit
for bit."""

from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil.frontend.milproto.load import load as load_program

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.conversion.pipeline import plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.coreml_tools import Model_pb2
from ane_moe.emit.coreml.package import MODEL
from ane_moe.emit.coreml.template import value_name
from ane_moe.families import describe
from ane_moe.forecast.concerns import concerns_of_plan
from ane_moe.forecast.workload import workload_of
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format, find_recipe
from ane_moe.loop.embedding_table import open_embeddings
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.summary import summarize
from ane_moe.model.weight import EMBEDDING
from ane_moe.placement.predicted import predict
from ane_moe.placement.targets import find_target
from ane_moe.runtime import load_package
from ane_moe.verification.verify import verify
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

FORMATS = [
    "int8",
    "int4-channel",
    "lut6",
    "lut4",
    "lut3-tensor",
    "lut4+scale",
    "lut4-v2",
    "apple2",
    "int4-block32",
    "sparse50",
    "sparse50+int8",
    "sparse50+lut4",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


def expanded_by_coremltools(package: Path) -> dict[str, dict[str, np.ndarray]]:
    """Values of all compressed weights by function, as coremltools' own loader expands them."""
    model = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    program = load_program(
        model, model.specificationVersion, str(package / "Data/com.apple.CoreML/weights")
    )
    return {
        name: {
            op.outputs[0].name: value_of(op)
            for op in function.operations
            if op.op_type.startswith("constexpr")
            and len(op.outputs) == 1
            and op.name.startswith("w_")
        }
        for name, function in program.functions.items()
    }


def value_of(op) -> np.ndarray:
    """coremltools does not follow a palette that is itself made by an operation; its own look-up is
    called on that."""
    if (
        op.op_type == "constexpr_lut_to_dense"
        and op.lut.op is not None
        and op.lut.op.op_type.startswith("constexpr")
    ):
        return op.decompress(op.indices.val, value_of(op.lut.op).astype(np.float16), None)
    return op.materialized_val_inference()


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_of_the_package_is_the_one_meant(checkpoint, tmp_path, name):
    options = ConvertOptions(recipe=find_recipe(name), prefill=4)
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=options.recipe, prefill=4)
    opened, seen = open_checkpoint(checkpoint), 0
    for shard in plan(checkpoint, options).shards:
        theirs = expanded_by_coremltools(out / shard.path)
        assert set(theirs) == {"decode", "prefill"}
        for weight, choice in shard.choices.items():
            meant = expand(find_format(choice.format).encode(opened.read(shard.sources[weight])))
            for function in theirs.values():
                found = function[value_name(weight)]
                assert np.array_equal(found.astype(np.float16).reshape(meant.shape), meant), weight
            seen += 1
    assert seen == 4 + 4 * 3 + 2  # attention, experts, head
    manifest = read_manifest(out)
    assert manifest.weights == name and manifest.recipe["roles"]["default"]["format"] == name
    for shard in manifest.shards:
        size = (out / shard.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        stored = summarize(out / shard.path).weight_bytes
        assert (
            stored <= shard.weight_bytes + 4 * 40 and shard.weight_bytes <= size
        )  # vector axes lie in the program
        assert (
            size < shard.weight_bytes + 128 * 4 * 40
        )  # decode and prefill share one copy: a second would not fit
    target = find_target("m2")  # where states are undecided
    report = predict([(out / shard.path, shard.path) for shard in manifest.shards], target)
    findings = [finding for function in report.functions for finding in function.findings]
    warned = {concern.rule for concern in concerns_of_plan(plan(checkpoint, options), target)}
    if "block32" in name:
        warned.remove("per-block-weight")  # a row of this model is a single block
    assert "state-access" in warned and warned <= {finding.rule for finding in findings}


@pytest.mark.parametrize(
    ("name", "routing"), [("int8", "masked"), ("lut4", "sparse"), ("tiny", "sparse")]
)
def test_compressed_models_verify_and_generate(checkpoint, tmp_path, name, routing):
    out = tiny_conversion(
        checkpoint,
        tmp_path / "out",
        recipe=find_recipe(name),
        routing=routing,
        golden=True,
        prefill=4,
    )
    report = verify(out, runtime="reference", min_cosine=0.5, min_logit_cosine=0.5)
    assert report.weights == name and not report.integrity and report.shards
    logits = Session(load_shards(out, "reference")).prefill([3, 5, 7, 9, 11])
    assert np.isfinite(logits).all() and np.ptp(logits) > 0
    # Weights that are never kept expanded give the same bits.
    shards = load_shards(out, "reference", memory_mb=0)
    assert np.array_equal(Session(shards).prefill([3, 5, 7, 9, 11]), logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_compressed_embedding_is_what_was_meant_and_verifies(tmp_path, tied):
    source = tiny_checkpoint("granitemoe", tmp_path / "checkpoint", tie_word_embeddings=tied)
    (tmp_path / "mine.toml").write_text('[roles]\ndefault = "fp16"\nembedding = "int8"\n')
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    out = tiny_conversion(source, tmp_path / "out", recipe=recipe, golden=True, prefill=4)
    manifest, (spec, sources) = read_manifest(out), describe(open_checkpoint(source))
    weight = open_checkpoint(source).read(sources[EMBEDDING])
    meant = expand(find_format("int8").encode(weight))
    table = open_embeddings(out, manifest)
    assert np.array_equal(table[:], meant) and np.array_equal(table[3], meant[3])
    assert np.array_equal(table[np.array([5, 0])], meant[[5, 0]])
    assert (out / "embed.bin").stat().st_size == spec.vocab * (spec.d_model + 2)
    facts = manifest.compression["embedding"]
    error = float(
        np.linalg.norm(meant.astype(np.float32) - weight)
        / np.linalg.norm(weight.astype(np.float32))
    )
    assert facts["formats"] == {"int8": weight.size} and facts["relative_error"] == pytest.approx(
        error, rel=1e-3
    )
    report = verify(out, runtime="reference")
    assert (
        report.as_stored is not None and report.as_stored.shards and not report.as_stored.failures
    )
    assert not report.integrity and not report.failures
    assert workload_of(out).embed_bytes == plan(source, ConvertOptions(recipe=recipe)).embed_bytes


def test_directions_kept_apart_lower_the_error(checkpoint, tmp_path):
    errors = {}
    for rank in (0, 4):
        recipe = find_recipe("apple2", rank=rank)
        out = tiny_conversion(checkpoint, tmp_path / f"rank{rank}", recipe=recipe, golden=True)
        report = verify(out, runtime="reference", min_cosine=0.0, min_logit_cosine=0.0)
        errors[rank] = np.mean(
            [row.relative_l2 for row in report.shards if row.relative_l2 is not None]
        )
    assert errors[4] < errors[0]


def test_the_recipe_is_part_of_the_content_key(checkpoint, tmp_path):
    out = tiny_conversion(checkpoint, tmp_path / "a", recipe=find_recipe("int8"))
    other = tiny_conversion(checkpoint, tmp_path / "b", recipe=find_recipe("small"))
    keys = [
        {shard.path: shard.content_key for shard in read_manifest(folder).shards}
        for folder in (out, other)
    ]
    assert {path for path in keys[0] if keys[0][path] != keys[1][path]} == {
        "moe/layer_00.mlpackage"
    }


def test_functions_load_with_compressed_weights(checkpoint, tmp_path):
    out = tiny_conversion(checkpoint, tmp_path / "out", recipe=find_recipe("sparse50+lut4"))
    function = load_package(out / "moe/layer_00.mlpackage", "decode", "reference")
    outputs = function.predict({"x": np.ones((1, 24, 1, 1), np.float16)}, None)
    assert np.isfinite(outputs["y"]).all()


@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe"])
def test_a_tied_embedding_is_not_taken_for_the_compressed_head(tmp_path, family):
    """The golden of the stored weights has the head as it is compressed, and the embedding as it is
    not."""
    source = tiny_checkpoint(family, tmp_path / "checkpoint", tie_word_embeddings=True)
    out = tiny_conversion(source, tmp_path / "out", recipe=find_recipe("lut2"), golden=True)
    report = verify(out, runtime="reference")
    assert (
        report.as_stored is not None and report.as_stored.shards and not report.as_stored.failures
    )
    assert report.failures and report.cause == "compression"
    embed = next(row for row in report.as_stored.shards if row.kind == "embed")
    assert embed.relative_l2 == 0
