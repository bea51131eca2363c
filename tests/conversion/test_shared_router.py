"""Packages of layers that share a router: stored once where one package has the layers, and one
blob, by its bytes, in all."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.emit.coreml.package import MODEL, WEIGHTS
from ane_moe.formats.recipe import FP16
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.proto import Model_pb2
from ane_moe.mlprogram.reader import read_program
from ane_moe.original.stored_weights import stored_weights
from ane_moe.placement.facts import function_facts
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint

IDS = np.random.default_rng(1).integers(3, 211, 21).tolist()
GROUPS = {"expert_groups": [[2, 12], [1, 12]]}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return make_model("omni_moe", **GROUPS)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("omni") / "checkpoint")


def conversion(checkpoint: Path, out: Path, **options) -> Path:
    convert(checkpoint, out, ConvertOptions(context=64, recipe=FP16, prefill=0, **options))
    return out


@pytest.fixture(scope="module")
def stacked(checkpoint, tmp_path_factory) -> Path:
    return conversion(checkpoint, tmp_path_factory.mktemp("stack") / "out", layers_per_shard=3)


def router_places(package: Path) -> Iterator[tuple[str, int]]:
    """Each constant of a router in a package, and where it lies in the weight file."""
    model = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    for function in model.mlProgram.functions.values():
        for operation in function.block_specializations[function.opset].operations:
            name = operation.outputs[0].name if operation.outputs else ""
            if operation.type == "const" and "router__" in name:
                yield name, operation.attributes["val"].blobFileValue.offset


def test_a_package_has_the_router_of_its_layers_once(stacked: Path) -> None:
    (stack, *_) = read_manifest(stacked).shards
    assert stack.layers == (0, 1, 2)
    places = dict(router_places(stacked / stack.path))
    for kind in ("weight", "bias"):
        first, second, third = (places[f"w_layers__{n}__ffn__router__{kind}"] for n in range(3))
        assert first == second != third
    program = read_program(stacked / stack.path)
    counted = function_facts(program, "decode").facts["weight_bytes"]
    assert stack.functions[0].weight_bytes == counted == stack.weight_bytes
    stored = (stacked / stack.path / WEIGHTS).stat().st_size
    planned = stack.weight_bytes
    assert planned < stored < planned + 128 * 200  # and what lies between arrays


def test_every_package_has_the_same_blob(checkpoint, stacked, tmp_path) -> None:
    apart = conversion(checkpoint, tmp_path / "out")
    for out in (apart, stacked):
        hashes: dict[int, str] = {}
        for weight in stored_weights(read_manifest(out).shards, out):
            if weight.name.path == "router.weight":
                hashes[weight.name.layer] = hashlib.sha256(weight.value.tobytes()).hexdigest()
        assert hashes[0] == hashes[1] != hashes[2] and len(hashes) == 3
    router = 2 * (12 * 72 + 12)
    difference = sum(shard.weight_bytes for shard in read_manifest(apart).shards) - sum(
        shard.weight_bytes for shard in read_manifest(stacked).shards
    )
    assert difference == router


def test_logits_are_the_models_and_verify_passes(model, stacked, checkpoint, tmp_path) -> None:
    session = Session(load_shards(stacked, "reference"))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    found = np.stack([session.decode(identifier).copy() for identifier in IDS])
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert np.median((found * expected).sum(1) / norms) > 0.9999
    prompts = tmp_path / "prompts.json"
    prompts.write_text(str([IDS]))
    report = verify(stacked, checkpoint=checkpoint, prompts=prompts, runtime="reference")
    assert report.passed and not report.integrity


def test_a_wrong_router_is_found_and_an_unchanged_one_made_again_for_nothing(
    model, stacked, checkpoint, tmp_path
) -> None:
    again = convert(
        checkpoint,
        stacked,
        ConvertOptions(context=64, recipe=FP16, prefill=0, layers_per_shard=3),
    )
    assert again.reused and not again.written
    wrong = make_model("omni_moe", **GROUPS)
    with torch.no_grad():
        wrong.model.routers[0].weight.mul_(1.5)
    save_checkpoint(wrong, tmp_path / "wrong")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(str([IDS]))
    report = verify(stacked, checkpoint=tmp_path / "wrong", prompts=prompts, runtime="reference")
    assert not report.passed
