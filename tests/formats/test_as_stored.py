"""Quantised checkpoints carried over as they are: what a package holds means what the library that
wrote the checkpoint decodes, and takes no more bytes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.checkpoints.gguf.blocks import BY_NAME, Rows
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.conversion.as_stored import DEAR, MIXED, PLAIN, form_of
from ane_moe.conversion.job import job_of
from ane_moe.conversion.pipeline import convert, plan
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.coreml_tools import Model_pb2
from ane_moe.emit.coreml.package import MODEL
from ane_moe.emit.coreml.template import value_name
from ane_moe.errors import UserError
from ane_moe.formats.as_stored import AsStored, Codes, parse_as_stored
from ane_moe.formats.expand import expand
from ane_moe.formats.recipe import find_format, find_recipe
from ane_moe.formats.stored_form import stored_form
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest
from ane_moe.model.weight import EMBEDDING
from ane_moe.opened import open_model
from ane_moe.verification.verify import verify
from tests.checkpoints.packers import PACKERS
from tests.checkpoints.test_packed import MATRIX, NAME, RECORDED, opened, recorded, save_packed
from tests.models import make_model, save_checkpoint

# The form of each, and whether scales of the checkpoint are rounded (to fp16).
FORMS = {
    "fp8 blocks": ("as-stored-lut8-16x16", None),
    "fp8 rows": ("as-stored-lut8-1xall", None),
    "fp8 whole": ("as-stored-lut8-allxall", False),
    "4 bit in runs": ("as-stored-int4-1x32", True),
    "4 bit with zero points": ("as-stored-int4-zeros-1x32", True),
    "4 bit by row": ("as-stored-int4-1xall", True),
    "3 bit in runs": ("as-stored-int4-zeros-1x16", True),
    "8 bit in runs": ("as-stored-int8-1x32", True),
    "int8": ("as-stored-int8-1xall", True),
    "nvfp4": ("as-stored-level4-1x16", True),
    "nvfp4 of ModelOpt": ("as-stored-level4-1x16", True),
    "mxfp4 in rows": ("as-stored-level4-1x32", False),
    "mlx 2 bit": ("as-stored-lut2-1x32", False),
    "mlx 4 bit": ("as-stored-lut4-1x32", False),
    "mlx 8 bit": ("as-stored-lut8-1x32", None),
    "gptq 4 bit": ("as-stored-int4-zeros-1x32", False),
    "gptq 3 bit": ("as-stored-int4-zeros-1x32", False),
    "gptq, second form": ("as-stored-int4-zeros-1x32", False),
    "awq": ("as-stored-int4-zeros-1x32", False),
}
# The same of what libraries wrote that are not installed: rounded are levels, scales, products.
RECORDED_FORMS = {
    "bitsandbytes nf4": "as-stored-real4-1x64",
    "bitsandbytes nf4, nested": "as-stored-real4-1x64",
    "bitsandbytes fp4": "as-stored-real4-1x64",
    "bitsandbytes fp4, nested": "as-stored-real4-1x64",
}
HALF_STEP = 2.0**-11  # the most that rounding to fp16 changes, relative


def whole(**facts: Any) -> TensorSource:
    return TensorSource(EMBEDDING, f"{NAME}weight", tuple(MATRIX.shape), **facts)


def with_order_said(form: str) -> dict[str, Any]:
    config = json.loads(json.dumps(PACKERS[form].config))
    config.get("quantization_config", {})["desc_act"] = False
    return config


def carried(checkpoint: Checkpoint, source: TensorSource, form: AsStored) -> np.ndarray:
    pieces = checkpoint.tensors[source.key].codec.pieces
    codes = Codes(values=pieces.values, **checkpoint.taken_apart(source))
    encoded = form.carry(checkpoint.read(source), codes)
    assert encoded.stored_bytes == form.stored_bytes(*source.shape)
    assert sum(len(arrays) for arrays in encoded.arrays) == form.stored_arrays
    return expand(encoded)


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_means_what_its_library_decodes(form: str, tmp_path: Path) -> None:
    tensors, numbers = PACKERS[form].pack(MATRIX)
    name, rounded = FORMS[form]
    checkpoint = opened(tmp_path, with_order_said(form), tensors)
    found = form_of(checkpoint, whole())
    if rounded is None:  # palettes of so small a matrix take more than fp16
        assert found == DEAR
        rounded, found = False, parse_as_stored(name)
    assert isinstance(found, AsStored) and found.name == name
    ours, meant = carried(checkpoint, whole(), found), numbers.numpy()
    if not rounded:
        assert np.array_equal(ours, meant.astype(np.float16))
    assert np.abs(ours - meant).max() <= 2 * HALF_STEP * np.abs(meant).max()
    assert (np.abs(ours - meant) <= 2.01 * HALF_STEP * np.abs(meant) + 1e-7).all()


@pytest.mark.parametrize("form", RECORDED_FORMS)
def test_a_matrix_means_what_its_library_decoded(form: str, tmp_path: Path) -> None:
    entry = RECORDED[form]
    tensors = {name: torch.from_numpy(recorded(t).copy()) for name, t in entry["tensors"].items()}
    checkpoint = opened(tmp_path, entry["config"], tensors)
    meant = checkpoint.made(f"{NAME}weight")
    assert hashlib.sha256(meant.tobytes()).hexdigest() == entry["sha256"]
    source = TensorSource(EMBEDDING, f"{NAME}weight", meant.shape)
    found = form_of(checkpoint, source)
    assert isinstance(found, AsStored) and found.name == RECORDED_FORMS[form]
    ours = carried(checkpoint, source, found)
    assert (np.abs(ours - meant) <= 3.01 * HALF_STEP * np.abs(meant) + 1e-7).all()


@pytest.mark.parametrize("form", ["4 bit with zero points", "awq", "mxfp4 in rows", "fp8 whole"])
def test_parts_of_a_matrix_are_carried_over_too(form: str, tmp_path: Path) -> None:
    tensors, numbers = PACKERS[form].pack(MATRIX)
    checkpoint = opened(tmp_path, with_order_said(form), tensors)
    cuts = {
        "rows": (whole(rows=(24, 48)), numbers[24:48]),
        "pairs": (whole(pairs=16), numbers.reshape(4, 8, 2, 96).transpose(1, 2).reshape(64, 96)),
        "runs": (whole(runs=(16, 4, 12)), numbers.reshape(4, 16, 96)[:, 4:12].reshape(32, 96)),
        "scaled": (whole(scale=0.25), numbers / 4),
    }
    for what, (source, meant) in cuts.items():
        found = form_of(checkpoint, source)
        assert isinstance(found, AsStored), what
        ours, exact = carried(checkpoint, source, found), meant.numpy()
        assert (np.abs(ours - exact) <= 2.01 * HALF_STEP * np.abs(exact) + 1e-7).all(), what


def test_what_cannot_be_carried_over_says_why(tmp_path: Path) -> None:
    tensors, _ = PACKERS["gptq 8 bit, shuffled"].pack(MATRIX)
    checkpoint = opened(tmp_path, PACKERS["gptq 8 bit, shuffled"].config, tensors)
    assert form_of(checkpoint, whole()) == DEAR
    plain = save_checkpoint(make_model("qwen3_moe", num_hidden_layers=1), tmp_path / "plain")
    model = open_model(plain)
    assert {form_of(model.checkpoint, source) for source in model.sources.values()} == {PLAIN}


def test_a_zero_point_without_a_place_is_one_line() -> None:
    form = parse_as_stored("as-stored-int4-zeros-1x4")
    ones = np.ones((2, 8), np.float32)
    codes = Codes(ones, tuple(map(float, range(16))), ones, 16 * ones)  # GPTQ's first form has 16
    with pytest.raises(UserError, match="a zero point of 16; give its role another format"):
        form.carry(ones.astype(np.float16), codes)


def test_blocks_that_are_not_alike_are_found() -> None:
    ones = np.ones((2, 8), np.float32)
    scales = np.arange(16, dtype=np.float32).reshape(2, 8)
    for name in ("as-stored-int4-1x4", "as-stored-level4-1x4"):
        with pytest.raises(ValueError, match="more than one scale"):
            form = parse_as_stored(name)
            form.carry(ones.astype(np.float16), Codes(ones, [0.0, 1.0], scales))
    with pytest.raises(ValueError, match="different numbers"):
        form = parse_as_stored("as-stored-lut4-1x4")
        form.carry(scales.astype(np.float16), Codes(ones, [0.0, 1.0]))


@pytest.mark.parametrize(
    ("name", "told", "leaves"),
    [
        ("as-stored-int4-1x32", "int4 block 32", True),
        ("as-stored-int8-1xall", "int8 per channel", False),
        ("as-stored-level4-1x32", "lut4 per tensor block 32", True),
        ("as-stored-lut8-128x128", "lut8 g128x128", False),
        ("as-stored-lut8-allxall", "lut8 per tensor", False),
    ],
)
def test_placement_rules_know_the_forms(name: str, told: str, leaves: bool) -> None:
    assert stored_form(name) == told and find_format(name).leaves_engine == leaves


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Q4_0", "as-stored-int4-1x32"),
        ("Q8_0", "as-stored-int8-1x32"),
        ("MXFP4", "as-stored-level4-1x32"),
        ("IQ4_NL", "as-stored-level4-1x32"),
    ],
)
def test_blocks_of_ggml_mean_what_gguf_decodes(kind: str, name: str, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    block = BY_NAME[kind]
    raw = np.random.default_rng(0).integers(0, 256, (8, 4 * block.size), dtype=np.uint8)
    head = raw.reshape(-1, block.size)
    scales = np.random.default_rng(1).uniform(0.01, 0.1, len(head))
    if kind == "MXFP4":
        head[:, 0] = 120
    else:
        head[:, :2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    (tmp_path / "blocks").write_bytes(raw.tobytes())
    place = StoredTensor("w", tmp_path / "blocks", kind, (8, 128), 0, raw.nbytes)
    tensor = replace(place, dtype="F32", codec=Rows(place, 128))
    checkpoint = Checkpoint(tmp_path, {}, {}, {"w": tensor})
    source = TensorSource(EMBEDDING, "w", (8, 128))
    meant = quants.dequantize(raw, GGMLQuantizationType[kind])
    found = form_of(checkpoint, source)
    assert isinstance(found, AsStored) and found.name == name
    assert np.array_equal(carried(checkpoint, source, found), meant.astype(np.float16))
    mixed = replace(place, dtype="Q4_K")
    other = {"w": replace(tensor, codec=Rows(mixed, 128))}
    assert form_of(Checkpoint(tmp_path, {}, {}, other), source) == MIXED


# --- whole models

WHOLE = ("4 bit in runs", "awq", "fp8 whole")


def as_coremltools_expands(package: Path) -> dict[str, np.ndarray]:
    model = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    program = load_program(
        model, model.specificationVersion, str(package / "Data/com.apple.CoreML/weights")
    )
    operations = program.functions["decode"].operations
    return {
        op.outputs[0].name: np.asarray(op.materialized_val_inference())
        for op in operations
        if op.op_type.startswith("constexpr") and op.name in {o.name for o in op.outputs}
        if not op.name.endswith("__0")
    }


@pytest.mark.parametrize("form", WHOLE)
def test_packages_hold_the_checkpoint_and_verify_as_such(form: str, tmp_path: Path) -> None:
    quantised, _ = save_packed(tmp_path, form)
    out, recipe = tmp_path / "out", find_recipe("as-stored")
    options = ConvertOptions(recipe=recipe, prefill=4, layers=(0,), state="explicit")
    report = convert(quantised, out, options, golden=True)
    assert any(f"as {FORMS[form][0]}" in note for note in report.notes)
    checkpoint, manifest, seen = open_checkpoint(quantised), read_manifest(out), 0
    for shard in plan(quantised, options).shards:
        theirs = as_coremltools_expands(out / shard.path)
        for weight, choice in shard.choices.items():
            source, found = shard.sources[weight], theirs[value_name(weight)]
            meant = checkpoint.made(source.key)[slice(*(source.rows or (None,)))]
            if not FORMS[form][1]:
                meant = meant.astype(np.float16)
            error = np.abs(found.astype(np.float32).reshape(meant.shape) - meant)
            assert error.max() <= (2.01 * HALF_STEP * np.abs(meant).max() if FORMS[form][1] else 0)
            seen += choice.format.startswith("as-stored-")
    assert seen == 4 + 6 * 3
    proof = verify(out, runtime="reference")
    assert not proof.failures and not proof.integrity
    for facts in manifest.compression.values():
        assert facts["relative_error"] < (HALF_STEP if FORMS[form][1] else 1e-7)
        assert facts["bits_per_weight"] < (5.5 if "4" in FORMS[form][0] else 9.4)


def test_a_role_can_be_as_stored_and_others_not(tmp_path: Path) -> None:
    quantised, _ = save_packed(tmp_path, "4 bit in runs")
    (tmp_path / "mine.toml").write_text('[roles]\ndefault = "int8"\nexperts = "as-stored"\n')
    options = ConvertOptions(recipe=find_recipe(str(tmp_path / "mine.toml")))
    planned = plan(quantised, options)
    by_kind = {shard.kind: {c.format for c in shard.choices.values()} for shard in planned.shards}
    assert by_kind["attn"] == {"int8"} and by_kind["moe"] == {"as-stored-int4-1x32"}
    assert planned.source.notes[-1].startswith("as-stored: experts.up: 12 as as-stored-int4-1x32")


def test_experts_of_gpt_oss_are_carried_over_and_generate(tmp_path: Path) -> None:
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    plain = save_checkpoint(model, tmp_path / "plain")
    tensors, packed = load_file(plain / "model.safetensors"), {}
    seeded = torch.Generator().manual_seed(0)
    for name in list(tensors):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensors.pop(name).shape
            size = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=seeded)
            scales = torch.randint(118, 124, size, dtype=torch.uint8, generator=seeded)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors | packed, plain / "model.safetensors", {"format": "pt"})
    options = ConvertOptions(recipe=find_recipe("as-stored"), prefill=4)
    convert(plain, tmp_path / "out", options)
    convert(plain, tmp_path / "fp16", ConvertOptions(recipe=find_recipe("fp16"), prefill=4))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    numbers = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    shard = next(
        s for s in read_manifest(tmp_path / "out").shards if s.path == "moe/layer_01.mlpackage"
    )
    found = as_coremltools_expands(tmp_path / "out" / shard.path)
    up = found[value_name("experts.2.up.weight")]
    assert np.array_equal(up[:, :, 0, 0], numbers[2].float().numpy()[:, 1::2].T.astype(np.float16))
    logits = [
        Session(load_shards(tmp_path / folder, "reference")).prefill([3, 5, 7, 9, 11])
        for folder in ("out", "fp16")
    ]
    assert np.array_equal(*logits)
    rows = []
    for name in ("as-stored", "fp16"):
        streamed = ConvertOptions(routing="stream", recipe=find_recipe(name), prefill=4)
        convert(plain, tmp_path / f"stream-{name}", streamed)
        shards = load_shards(tmp_path / f"stream-{name}", "reference")
        rows.append(Session(shards).prefill([3, 5, 7, 9, 11]))
    assert np.array_equal(*rows)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / f"stream-{name}").rglob("layer_*.bin"))
        for name in ("as-stored", "fp16")
    ]
    assert sizes[0] < sizes[1] / 2
    manifest = read_manifest(tmp_path / "out")
    assert manifest.compression["experts.up"]["bits_per_weight"] < 4.6
    assert job_of(open_model(plain), tmp_path, options).plan.disk_bytes < 1e9
