"""GGUF files, read as the checkpoints they were made from: numbers against transformers' and gguf's
decoders, whole models against the safetensors checkpoint of the same numbers."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.integrations.gguf import dequant

from ane_moe.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ane_moe.checkpoints.coded import FP4, decoded
from ane_moe.checkpoints.gguf.blocks import TYPES
from ane_moe.checkpoints.gguf.header import plain_rows, read_gguf
from ane_moe.cli import main
from ane_moe.errors import UserError
from ane_moe.families import describe
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import read_golden
from tests.checkpoints.gguf_models import ARCHITECTURES, make, save_both

RANDOM = np.random.default_rng(0)
DECODED = [kind for kind, facts in TYPES.items() if facts.decoded]
QUANTIZED = [kind for kind in DECODED if kind in dequant.GGML_BLOCK]
OTHERS = [kind for kind in DECODED if kind not in dequant.GGML_BLOCK]
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def written(file: Path, data: np.ndarray, kind: Kind, name: str = "some") -> Path:
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, and what was printed on stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def numbers(file: Path, name: str = "some") -> np.ndarray:
    return Checkpoint(file, {}, {}, read_gguf(file).tensors).made(name)


def test_types_have_the_sizes_of_ggml() -> None:
    assert {kind.value for kind in Kind} == TYPES.keys()
    for number, kind in TYPES.items():
        assert kind.name == Kind(number).name
        assert (kind.block, kind.size) == gguf.GGML_QUANT_SIZES[Kind(number)]


@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: TYPES[number].name)
def test_blocks_of_any_bytes_are_the_numbers_that_transformers_decodes(
    number: int, tmp_path: Path
) -> None:
    kind = TYPES[number]
    stored = RANDOM.integers(0, 256, (6, 5 * kind.size), dtype=np.uint8)
    found = numbers(written(tmp_path / "m.gguf", stored, Kind(number)))
    expected = dequant.dequantize(torch.from_numpy(stored), number).numpy().reshape(found.shape)
    assert found.shape == (6, 5 * kind.block)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("number", OTHERS, ids=lambda number: TYPES[number].name)
def test_blocks_that_transformers_lacks_are_the_numbers_that_gguf_decodes(
    number: int, tmp_path: Path
) -> None:
    stored = RANDOM.integers(0, 256, (6, 5 * TYPES[number].size), dtype=np.uint8)
    found = numbers(written(tmp_path / "m.gguf", stored, Kind(number)))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(stored, Kind(number))
    assert np.array_equal(found, expected, equal_nan=True)


def test_mxfp4_is_codes_times_powers_of_2(tmp_path: Path) -> None:
    """OCP microscaling formats 1.0; of 16 bytes the lower halves come first."""
    blocks = RANDOM.integers(0, 256, (4, 3, 17), dtype=np.uint8)
    blocks[..., 0] = RANDOM.integers(100, 150, (4, 3))
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=2)
    scales = 2.0 ** (blocks[..., :1].astype(float) - 127)
    expected = (np.asarray(FP4)[codes] * scales).reshape(4, 96)
    found = numbers(written(tmp_path / "m.gguf", blocks.reshape(4, 51), Kind.MXFP4))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_gguf_quantises_is_what_it_decodes(name: str, tmp_path: Path) -> None:
    values = RANDOM.standard_normal((3, 4, 512), dtype=np.float32)
    stored = gguf.quants.quantize(values, Kind[name])
    found = numbers(written(tmp_path / "m.gguf", stored, Kind[name]))
    assert np.array_equal(found, gguf.quants.dequantize(stored, Kind[name]))
    assert np.abs(found - values).mean() < 1


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_plain_numbers_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    values = RANDOM.standard_normal((3, 33), dtype=np.float32)
    stored = gguf.quants.quantize(values, Kind[name])
    file = written(tmp_path / "m.gguf", stored, Kind[name])
    expected = gguf.quants.dequantize(stored, Kind[name])
    assert np.array_equal(numbers(file), expected)
    codec = plain_rows(read_gguf(file).tensors["some"]).codec
    assert codec is not None
    pieces = [piece for _, piece in decoded(codec, 20, 50)]
    assert np.array_equal(np.concatenate(pieces), expected.reshape(-1)[20:70])


# --- whole models


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_gguf_model_is_the_model_of_its_numbers(family: str, kind: str, tmp_path: Path) -> None:
    model, plain = (open_checkpoint(path) for path in save_both(make(family), tmp_path, Kind[kind]))
    same(model, plain)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
        (
            "qwen3_moe",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("mixtral", {"sliding_window": 17}),
        ("granitemoe", {"attention_bias": False, "tie_word_embeddings": False}),
        ("qwen2_moe", {"qkv_bias": False}),
    ],
)
def test_variants_of_an_architecture_are_told_apart(
    family: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    both = save_both(make(family, **changed), tmp_path, Kind.Q8_0)
    same(*(open_checkpoint(path) for path in both))


def same(model: Checkpoint, plain: Checkpoint) -> None:
    (spec, sources), (plain_spec, plain_sources) = describe(model), describe(plain)
    assert spec == plain_spec
    assert sources.keys() == plain_sources.keys()
    for name, source in sources.items():
        assert np.array_equal(model.read(source), plain.read(plain_sources[name])), name


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "lfm2_moe", "mixtral", "qwen2_moe"])
def test_the_golden_of_a_gguf_model_is_that_of_its_numbers(family: str, tmp_path: Path) -> None:
    logits = []
    for number, path in enumerate(save_both(make(family), tmp_path, Kind.Q8_0)):
        out = tmp_path / f"{number}.safetensors"
        capture_golden(open_checkpoint(path), layers=(0, 1), prompts=[[5, 9, 2, 40]], out=out)
        logits.append(read_golden(out).logits)
    assert np.array_equal(*logits)


def test_gate_and_up_in_one_stack_are_read_too(tmp_path: Path) -> None:
    """As newer files of llama.cpp have them."""
    path, plain = save_both(make("granitemoe"), tmp_path, Kind.Q8_0, fused=True)
    assert "blk.0.ffn_gate_up_exps.weight" in read_gguf(path).tensors
    same(open_checkpoint(path), open_checkpoint(plain))


def test_a_folder_and_each_part_of_a_split_model_give_the_whole(tmp_path: Path) -> None:
    first, plain = save_both(make("olmoe"), tmp_path, Kind.Q8_0, parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3 and first == parts[0]
    for path in (tmp_path, *parts):
        same(open_checkpoint(path), open_checkpoint(plain))
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no model-00002-of-00003\.gguf"):
        open_checkpoint(first)
    parts[2].rename(parts[1])
    (tmp_path / "elsewhere").rename(parts[2])
    with pytest.raises(UserError, match="is not the part that its name tells"):
        open_checkpoint(first)


def test_a_folder_of_two_models_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        written(tmp_path / name, np.ones((2, 3), np.float32), Kind.F32)
    with pytest.raises(UserError, match=r"more than one GGUF model.*a\.gguf, b\.gguf.*give one"):
        open_checkpoint(tmp_path)


def test_a_gguf_model_converts_and_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = save_both(make("olmoe", num_hidden_layers=2), tmp_path, Kind.Q8_0)
    out = tmp_path / "out"
    code, printed, said = ran(capsys, "convert", path, out, "--golden", "--context", 32)
    assert code == 0, said
    assert "GGUF: Q8_0 decoded exactly" in " ".join((printed + said).split())
    code, printed, said = ran(capsys, "verify", out, "--checkpoint", path)
    assert code == 0, printed + said


def test_a_plan_is_made_of_a_gguf_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = []
    for path in save_both(make("olmoe", num_hidden_layers=2), tmp_path, Kind.Q8_0):
        code, printed, said = ran(capsys, "plan", path, "--json")
        assert code == 0, said
        planned.append(json.loads(printed))
    assert planned[0]["choices"] == planned[1]["choices"]


# --- what is wrong with a file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = make("olmoe", num_hidden_layers=1)
    path, _ = save_both(model, tmp_path_factory.mktemp("sound"), Kind.Q8_0)
    return path.read_bytes()


def patched(stored: bytes, place: int, value: bytes) -> bytes:
    return stored[:place] + value + stored[place + len(value) :]


def tensor_field(stored: bytes, name: bytes, after: int) -> int:
    """The place of a field of a tensor's description, `after` bytes after its name."""
    return stored.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + after


HUGE = (1 << 62).to_bytes(8, "little")
NORM = b"blk.0.attn_norm.weight"
DAMAGE: dict[str, Any] = {
    "nothing": lambda stored: b"",
    "other bytes": lambda stored: b"GGML" + stored[4:],
    "version": lambda stored: patched(stored, 4, b"\x09"),
    "big-endian": lambda stored: patched(stored, 4, b"\0\0\0\x03"),
    "tensors without end": lambda stored: patched(stored, 8, HUGE),
    "metadata without end": lambda stored: patched(stored, 16, HUGE),
    "a key without end": lambda stored: patched(stored, 24, HUGE),
    "truncated weights": lambda stored: stored[:-100],
    "truncated header": lambda stored: stored[:500],
    "too long": lambda stored: stored + bytes(64),
    "dimensions": lambda stored: patched(stored, tensor_field(stored, NORM, 0), b"\x07"),
    "a size of none": lambda stored: patched(stored, tensor_field(stored, NORM, 4), bytes(8)),
    "a size without end": lambda stored: patched(stored, tensor_field(stored, NORM, 4), HUGE),
    "a type": lambda stored: patched(stored, tensor_field(stored, NORM, 12), b"\x63"),
    "broken blocks": lambda stored: patched(stored, tensor_field(stored, NORM, 12), b"\x0c"),
    "an offset outside": lambda stored: patched(stored, tensor_field(stored, NORM, 16), HUGE),
    "an offset of another": lambda stored: patched(
        stored, tensor_field(stored, NORM, 16), bytes(8)
    ),
    "a name twice": lambda stored: stored.replace(b"attn_k_norm", b"attn_q_norm"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line(
    damage: str, sound: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(DAMAGE[damage](sound))
    code, printed, said = ran(capsys, "convert", file, tmp_path / "out")
    assert code == 2 and not printed
    assert said.count("\n") == 1 and "not a sound GGUF file" in said


@pytest.mark.parametrize("seed", range(40))
def test_shuffled_headers_end_in_one_line(seed: int, sound: bytes, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    stored = bytearray(sound)
    for place in random.integers(0, 3000, 8):
        stored[place] = random.integers(256)
    file = tmp_path / "model.gguf"
    file.write_bytes(stored)
    try:
        describe(open_checkpoint(file))
    except UserError as error:
        assert "\n" not in str(error)


def test_a_file_that_shrinks_while_it_is_read_is_one_line(sound: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(sound)
    checkpoint = open_checkpoint(file)
    file.write_bytes(sound[:-20_000])
    with pytest.raises(UserError, match="is truncated"):
        for name in checkpoint.tensors:
            checkpoint.made(name)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"add_sliding_window": 5}, "what is not known of olmoe; found: attention.sliding_window"),
        ({"add_rope_scaling_attn_factors": 2.0}, "rope.scaling.attn_factor"),
        ({"add_expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}, "expert_gating_func"),
        ({"add_rope_dimension_count": 8}, "rope.dimension_count is not supported"),
    ],
)
def test_metadata_that_would_change_the_model_are_refused(
    facts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path, _ = save_both(make("olmoe", num_hidden_layers=1), tmp_path, Kind.F16, **facts)
    with pytest.raises(UserError, match=said):
        open_checkpoint(path)


def test_unknown_and_dense_architectures_are_called_by_name(tmp_path: Path) -> None:
    for name, said in (
        ("gemma3", "'gemma3'; known: dots1, glm4moe, gpt-oss"),
        ("llama", "dense"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
        writer.add_tensor("some", np.ones((2, 3), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=said):
            open_checkpoint(tmp_path / "m.gguf")


def test_without_the_package_quantised_files_say_what_to_install(
    sound: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(sound)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Q8_0.*pip install ane-moe\[gguf\]"):
        open_checkpoint(tmp_path / "m.gguf")
