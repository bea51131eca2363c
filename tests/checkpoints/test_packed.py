"""Quantised checkpoints, decoded: each form against the library that writes it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from ane_moe.checkpoints.coded import E4M3, E5M2, Codes, decoded, float8
from ane_moe.checkpoints.packed import plain_tensors
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.model.weight import EMBEDDING
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import read_golden
from tests.checkpoints.packers import PACKERS
from tests.models import make_model, save_checkpoint

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_codes.json").read_text())
KINDS = {"U8": np.uint8, "F32": np.float32, "U32": np.uint32}
NAME = "model.layers.0.mlp.experts.3.up_proj."
MATRIX = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


def opened(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    file = folder / "model.safetensors"
    save_file({NAME + end: tensor.contiguous() for end, tensor in tensors.items()}, file)
    plain, forms = plain_tensors(config, {}, read_header(file))
    assert forms
    return Checkpoint(folder, {}, {}, plain)


def recorded(entry: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(bytes.fromhex(entry["hex"]), KINDS[entry["dtype"]])
    return flat.reshape(entry["shape"])


@pytest.mark.parametrize("form", PACKERS)
def test_numbers_are_those_of_the_library(form: str, tmp_path: Path) -> None:
    tensors, numbers = PACKERS[form].pack(MATRIX)
    checkpoint = opened(tmp_path, PACKERS[form].config, tensors)
    assert list(checkpoint.tensors) == [f"{NAME}weight"]
    assert np.array_equal(checkpoint.made(f"{NAME}weight"), numbers.numpy())


@pytest.mark.parametrize("form", RECORDED)
def test_numbers_are_those_that_other_libraries_gave(form: str, tmp_path: Path) -> None:
    entry = RECORDED[form]
    tensors = {name: torch.from_numpy(recorded(t).copy()) for name, t in entry["tensors"].items()}
    checkpoint = opened(tmp_path, entry["config"], tensors)
    numbers = checkpoint.made(f"{NAME}weight")
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == entry["sha256"]


def test_experts_of_gpt_oss_are_decoded_as_transformers_has_them(tmp_path: Path) -> None:
    seeded = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=seeded)
    scales = torch.randint(118, 132, (3, 10, 2), dtype=torch.uint8, generator=seeded)
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, file)
    plain, forms = plain_tensors({}, {}, read_header(file))
    assert forms == ["MXFP4"] and list(plain) == [name]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    checkpoint = Checkpoint(tmp_path, {}, {}, plain)
    assert np.array_equal(checkpoint.made(name), expected)  # (experts, inputs, outputs)
    one = TensorSource(EMBEDDING, name, expected.shape, index=1, columns=(1, 10, 2), transpose=True)
    assert np.array_equal(checkpoint.read(one), expected[1, :, 1::2].T.astype(np.float16))


def test_gate_and_up_of_an_expert_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=seeded)
    scales = torch.randint(118, 132, (3, 10, 2), dtype=torch.uint8, generator=seeded)
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, file)
    plain, _ = plain_tensors({}, {}, read_header(file))
    meant = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    expected = meant.numpy()
    decoded_rows, rows = [], Codes.rows
    monkeypatch.setattr(
        Codes, "rows", lambda self, *span: decoded_rows.append(span) or rows(self, *span)
    )
    checkpoint = Checkpoint(tmp_path, {}, {}, plain)
    whole = TensorSource(EMBEDDING, name, expected.shape, transpose=True)
    halves = {
        (expert, half): replace(whole, index=expert, columns=(half, 10, 2))
        for expert in range(3)
        for half in (0, 1)
    }
    for (expert, half), source in halves.items():
        numbers = expected[expert, :, half::2].T.astype(np.float16)
        assert np.array_equal(checkpoint.read(source), numbers)
    assert decoded_rows == [(0, 10), (10, 20), (20, 30)]
    apart = [checkpoint.taken_apart(halves[2, half]) for half in (0, 1)]
    products = [one["codes"] * one["scales"] for one in apart]
    assert np.array_equal(np.stack(products, 1).reshape(10, -1), expected[2].T)
    assert decoded_rows[3:] == [(20, 30)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_run_of_elements_is_read_alike(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    form = data.draw(st.sampled_from(sorted(PACKERS)))
    tensors, numbers = PACKERS[form].pack(MATRIX)
    checkpoint = opened(tmp_path_factory.mktemp("run"), PACKERS[form].config, tensors)
    codec = checkpoint.tensors[f"{NAME}weight"].codec
    assert codec is not None
    start = data.draw(st.integers(0, numbers.numel() - 1))
    count = data.draw(st.integers(1, numbers.numel() - start))
    pieces = list(decoded(codec, start, count))
    assert [first for first, _ in pieces] == list(
        np.cumsum([0, *(len(piece) for _, piece in pieces)])[:-1]
    )
    flat = np.concatenate([piece for _, piece in pieces])
    assert np.array_equal(flat, numbers.reshape(-1)[start : start + count].numpy())


@pytest.mark.parametrize(
    ("codes", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]
)
def test_8_bit_floats_are_those_of_torch(codes: tuple[float, ...], dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    assert np.array_equal(np.float32(codes), every.numpy(), equal_nan=True)
    assert len(float8(3)) == 256


# --- whole checkpoints

MODEL = {
    "hidden_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "mlp_only_layers": [],
    "num_experts": 6,
}
# What the library that makes such checkpoints leaves alone.
KEPT = ("norm", "mlp.gate.", "lm_head", "embed_tokens")


def save_packed(folder: Path, form: str) -> tuple[Path, Path]:
    """A model in a quantised form, and the plain checkpoint of the numbers it means."""
    model = make_model("qwen3_moe", **MODEL)
    plain = save_checkpoint(model, folder / "plain")
    config = json.loads((plain / "config.json").read_text())
    packed, numbers = {}, {}
    for file in sorted(plain.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.ndim != 2 or any(part in name for part in KEPT):
                packed[name] = numbers[name] = tensor
                continue
            coded, numbers[name] = PACKERS[form].pack(tensor.float())
            base = name.removesuffix("weight")
            packed |= {base + end: each.contiguous() for end, each in coded.items()}
        file.unlink()
    (plain / "model.safetensors.index.json").unlink(missing_ok=True)
    quantised = folder / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps(config | PACKERS[form].config))
    save_file(packed, quantised / "model.safetensors", {"format": "pt"})
    numbers = {name: tensor.contiguous() for name, tensor in numbers.items()}
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    return quantised, plain


WHOLE = ("fp8 blocks", "4 bit with zero points", "gptq 4 bit", "awq", "mlx 4 bit", "nvfp4")


@pytest.mark.parametrize("form", WHOLE)
def test_a_quantised_model_is_the_model_of_its_numbers(form: str, tmp_path: Path) -> None:
    quantised, plain = (open_checkpoint(folder) for folder in save_packed(tmp_path, form))
    (spec, sources), (plain_spec, plain_sources) = describe(quantised), describe(plain)
    assert spec == plain_spec and sources.keys() == plain_sources.keys()
    assert any("decoded exactly" in note for note in quantised.notes)
    for name, source in sources.items():
        read = quantised.read(source)
        assert np.array_equal(read, plain.read(plain_sources[name])), name


def test_the_golden_of_a_quantised_model_is_that_of_its_numbers(tmp_path: Path) -> None:
    quantised, plain = save_packed(tmp_path, "4 bit in runs")
    logits = []
    for folder in (quantised, plain):
        out = tmp_path / f"{folder.name}.safetensors"
        capture_golden(open_checkpoint(folder), layers=(0, 1), prompts=[[5, 9, 2, 40]], out=out)
        logits.append(read_golden(out).logits)
    assert np.array_equal(*logits)


def test_experts_that_mlx_stacks_are_taken_apart(tmp_path: Path) -> None:
    """`switch_mlp`, as mlx-lm's `sanitize` of Qwen3-MoE makes it, quantised and plain."""
    _, plain = save_packed(tmp_path, "mlx 4 bit")
    tensors, stacked = load_file(plain / "model.safetensors"), {}
    for layer in range(2):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            start = f"model.layers.{layer}.mlp"
            names = [f"{start}.experts.{expert}.{matrix}.weight" for expert in range(6)]
            whole = torch.stack([tensors.pop(name) for name in names])
            base = f"{start}.switch_mlp.{matrix}."
            if matrix == "up_proj":
                stacked[f"{base}weight"] = whole
                continue
            # The same codes again: numbers that a form holds survive it.
            coded, numbers = PACKERS["mlx 4 bit"].pack(whole.flatten(0, 1))
            tensors |= dict(zip(names, numbers.reshape(whole.shape), strict=True))
            stacked |= {base + end: t.reshape(6, -1, t.shape[-1]) for end, t in coded.items()}
    mixed = tmp_path / "mlx"
    mixed.mkdir()
    config = json.loads((plain / "config.json").read_text()) | PACKERS["mlx 4 bit"].config
    (mixed / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    save_file(kept | {k: t.contiguous() for k, t in stacked.items()}, mixed / "model.safetensors")
    ups = {n: t for n, t in load_file(plain / "model.safetensors").items() if ".up_proj" in n}
    expected = tensors | ups
    checkpoint = open_checkpoint(mixed)
    _, sources = describe(checkpoint)
    for source in sources.values():
        numbers = expected[source.key].numpy().astype(np.float16)
        assert np.array_equal(checkpoint.read(source), numbers), source.key


# --- what is wrong with a file


# Codes of which fewer rows are a smaller matrix: the model's own shapes tell.
SMALLER = {("fp8 blocks", "weight"), ("fp8 whole", "weight")}


@pytest.mark.parametrize("form", sorted(PACKERS.keys() - {"fp8 whole"}))
def test_sizes_that_do_not_agree_are_refused(form: str, tmp_path: Path) -> None:
    tensors, _ = PACKERS[form].pack(MATRIX)
    cut = [end for end, t in tensors.items() if t.numel() > 3 and (form, end) not in SMALLER]
    assert cut
    for end in cut:
        tensor = tensors[end]
        damaged = tensors | {end: tensor[:-3]}
        with pytest.raises(UserError) as caught:
            opened(tmp_path, PACKERS[form].config, damaged)
        assert NAME in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    tensors, _ = PACKERS["awq"].pack(MATRIX)
    checkpoint = opened(tmp_path, PACKERS["awq"].config, tensors)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is truncated"):
        checkpoint.made(f"{NAME}weight")


def test_scales_of_activations_are_left_out_by_name(tmp_path: Path) -> None:
    quantised, _ = save_packed(tmp_path, "fp8 whole")
    tensors = load_file(quantised / "model.safetensors")
    extra = "model.layers.0.self_attn.q_proj.input_scale"
    save_file(tensors | {extra: torch.ones(())}, quantised / "model.safetensors")
    checkpoint = open_checkpoint(quantised)
    _, sources = describe(checkpoint)
    kinds = checkpoint.left_out(sources)
    assert kinds == {"scales of activations, which are not quantised here": (extra,)}


def test_a_config_that_claims_codes_where_there_are_none_is_refused(tmp_path: Path) -> None:
    _, plain = save_packed(tmp_path, "fp8 rows")
    config = json.loads((plain / "config.json").read_text()) | PACKERS["fp8 rows"].config
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantised \(compressed-tensors\)"):
        describe(open_checkpoint(plain))


def test_gpt_oss_is_read_from_mxfp4(tmp_path: Path) -> None:
    """As openai's repositories have it: experts in blocks, all else bf16."""
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    plain = save_checkpoint(model, tmp_path / "plain")
    tensors, packed = load_file(plain / "model.safetensors"), {}
    seeded = torch.Generator().manual_seed(0)
    for name, tensor in list(tensors.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, columns, rows = tensor.shape
        size = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=seeded)
        scales = torch.randint(118, 124, size, dtype=torch.uint8, generator=seeded)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        tensors[name] = numbers.contiguous()
    kept = {n: t for n, t in tensors.items() if f"{n}_blocks" not in packed}
    quantised = tmp_path / "mxfp4"
    quantised.mkdir()
    config = json.loads((plain / "config.json").read_text())
    facts = {"quantization_config": {"quant_method": "mxfp4"}}
    (quantised / "config.json").write_text(json.dumps(config | facts))
    save_file(kept | packed, quantised / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    ours, theirs = open_checkpoint(quantised), open_checkpoint(plain)
    (spec, sources), (plain_spec, plain_sources) = describe(ours), describe(theirs)
    assert spec == plain_spec and len(packed) == 8
    for name, source in sources.items():
        assert np.array_equal(ours.read(source), theirs.read(plain_sources[name])), name
    logits = []
    for checkpoint in (ours, theirs):
        out = tmp_path / f"{checkpoint.folder.name}.safetensors"
        capture_golden(checkpoint, layers=(0, 1), prompts=[[5, 9, 2, 40]], out=out)
        logits.append(read_golden(out).logits)
    assert np.array_equal(*logits)
