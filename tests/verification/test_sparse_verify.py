"""`verify` on sparse conversions: every expert function has a row, and a wrong one fails by
name."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ane_moe.emit.coreml.package import WEIGHTS, sha256
from ane_moe.errors import UserError
from ane_moe.manifest import read_manifest
from ane_moe.mlprogram.reader import read_program
from ane_moe.original.golden import read_golden
from ane_moe.verification.verify import verify
from tests.models import make_model, save_checkpoint
from tests.verification.tiny import tiny_checkpoint, tiny_conversion

SPARSE = {"routing": "sparse", "expert_tokens": (1, 4), "prefill": 8, "golden": True}


@pytest.fixture(scope="module")
def conversion(checkpoint, tmp_path_factory) -> Path:
    return tiny_conversion(checkpoint, tmp_path_factory.mktemp("conversion") / "out", **SPARSE)


@pytest.fixture
def copy(conversion, tmp_path) -> Path:
    return Path(shutil.copytree(conversion, tmp_path / "copy"))


def functions_of(folder):
    return {
        (shard.path, function.name)
        for shard in read_manifest(folder).shards
        for function in shard.functions
    }


def test_every_function_of_every_package_has_a_row_that_passes(conversion):
    report = verify(conversion)
    assert report.passed
    rows = {(row.path, row.function) for row in report.shards}
    assert functions_of(conversion) <= rows
    assert {row.function for row in report.shards if row.kind == "dispatch"} == {
        "decode",
        "prefill",
        "decode against masked",
        "prefill against masked",
    }
    (routing,) = report.routing
    assert routing.set_agreement > 0.95


@pytest.mark.parametrize("group", [1, 7])
def test_shared_experts_and_groups_pass_too(group, tmp_path):
    checkpoint = save_checkpoint(
        make_model("qwen2_moe", num_hidden_layers=1), tmp_path / "checkpoint"
    )
    out = tiny_conversion(
        checkpoint, tmp_path / "out", **SPARSE, experts_per_function=group, context=128
    )
    report = verify(out)
    assert report.passed and functions_of(out) <= {
        (row.path, row.function) for row in report.shards
    }
    assert any(row.function == "shared_t4" for row in report.shards)


def test_residual_multipliers_are_part_of_what_an_expert_adds(tmp_path):
    checkpoint = tiny_checkpoint("granitemoe", tmp_path / "checkpoint")
    assert verify(tiny_conversion(checkpoint, tmp_path / "out", **SPARSE)).passed


def test_the_golden_of_single_experts_adds_up_to_the_layers(conversion):
    golden = read_golden(conversion / "golden.safetensors").layers[0]
    gates = np.take_along_axis(golden.router_probs, golden.router_indices.astype(np.int64), 1)
    gates /= gates.sum(1, keepdims=True)  # qwen3_moe renormalises
    seen = 0
    for expert, tokens in enumerate(golden.expert_tokens):
        for token, output in zip(tokens, golden.expert_outputs[expert], strict=True):
            others = [other for other in golden.router_indices[token] if other != expert]
            held = [
                list(golden.expert_tokens[other]).index(token)
                for other in others
                if token in golden.expert_tokens[other]
            ]
            if expert not in golden.router_indices[token] or len(held) < len(others):
                continue
            total = gates[token][list(golden.router_indices[token]).index(expert)] * output
            for other, place in zip(others, held, strict=True):
                total = (
                    total
                    + gates[token][list(golden.router_indices[token]).index(other)]
                    * golden.expert_outputs[other, place]
                )
            np.testing.assert_allclose(total, golden.ffn_delta[token], atol=1e-4)
            seen += 1
    assert seen


def edit_weight(folder: Path, path: str, function: str, weight: str, edit) -> None:
    """Change one weight in the blob file, and the manifest's hash of it."""
    constants = {
        operation.name: operation.attributes["val"]
        for operation in read_program(folder / path).functions[function].block.operations
        if operation.type == "const"
    }
    _, offset, size = constants[weight].blob
    file = folder / path / WEIGHTS
    data = bytearray(file.read_bytes())
    values = np.frombuffer(bytes(data[offset : offset + size]), np.float16)
    data[offset : offset + size] = edit(values).astype(np.float16).tobytes()
    file.write_bytes(data)
    manifest = read_manifest(folder)
    files = manifest.files | {f"{path}/{WEIGHTS}": sha256(file)}
    dataclasses.replace(manifest, files=files).write(folder)


def test_a_spoiled_expert_fails_in_all_its_functions_and_no_other_expert_does(copy):
    path = "experts/layer_00.mlpackage"
    edit_weight(copy, path, "expert_002_t1", "w_experts__0__up__weight", lambda w: np.roll(w, 1))
    report = verify(copy)
    failed = {row.function for row in report.shards if row.kind == "experts" and not row.passed}
    assert not report.passed and failed == {"expert_002_t1", "expert_002_t4"}


def test_a_router_that_chooses_others_is_seen_in_the_routing_and_the_dispatch(copy):
    edit_weight(copy, "attn/layer_00.mlpackage", "decode", "w_ffn__router__weight", lambda w: -w)
    report = verify(copy)
    assert report.routing[0].set_agreement < 0.5
    assert [row.function for row in report.shards if row.kind == "dispatch" and not row.passed] == [
        "decode",
        "prefill",
    ]
    assert all(row.passed for row in report.shards if row.kind != "dispatch")


def test_a_golden_without_single_experts_is_refused_and_the_checkpoint_helps(
    checkpoint, conversion, copy, tmp_path
):
    masked = tiny_conversion(checkpoint, tmp_path / "masked", prefill=0, golden=True)
    assert "layer_000.expert_outputs" not in load_file(masked / "golden.safetensors")
    shutil.copy(masked / "golden.safetensors", copy)
    manifest = read_manifest(copy)
    files = manifest.files | {"golden.safetensors": sha256(copy / "golden.safetensors")}
    dataclasses.replace(manifest, files=files).write(copy)
    with pytest.raises(UserError, match=r"single experts compute; found: layers \[0\]"):
        verify(copy)
    assert verify(copy, checkpoint=checkpoint).passed
