"""Odd checkpoints: what is read as transformers reads it, and what is said of the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.cli import main
from ane_moe.conversion.pipeline import ConvertOptions, convert, plan
from ane_moe.demo import demo_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config
from ane_moe.manifest import read_manifest
from ane_moe.model.weight import HEAD, parse_name
from ane_moe.original.capture import capture_golden
from ane_moe.original.checkpoint_tokenizer import read_tokenizer
from ane_moe.original.golden import read_golden
from ane_moe.verification.verify import verify
from tests.models import edit_config, make_model, read_config, save_checkpoint, save_fused

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("mixtral", num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "own"))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors) -> Path:
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    return store(folder, {change(key): tensor for key, tensor in weights(folder).items()})


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and everything that the command printed, on one line."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        describe(open_checkpoint(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- other names


def decoder(prefix: str, head: str = "lm_head.") -> Callable[[str], str]:
    """`model.` becomes `prefix`, and `lm_head.` `head`."""
    pairs = {"model.": prefix, "lm_head.": head}

    def change(key: str) -> str:
        old = next(old for old in pairs if key.startswith(old))
        return pairs[old] + key.removeprefix(old)

    return change


PREFIXES = {
    "torch.compile": decoder("_orig_mod.model.", "_orig_mod.lm_head."),
    "DistributedDataParallel": decoder("module.model.", "module.lm_head."),
    "compiled inside DistributedDataParallel": decoder(
        "module._orig_mod.model.", "module._orig_mod.lm_head."
    ),
    "a PEFT model": decoder("base_model.model.model.", "base_model.model.lm_head."),
    "a vision model of transformers 5": decoder("model.language_model."),
    "a vision model of transformers 4": decoder("language_model.model.", "language_model.lm_head."),
    "AutoModel": decoder(""),
    "compiled layers": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda key: (
        "_fsdp_wrapped_module." + key.replace("layers.1.", "layers.1._fsdp_wrapped_module.")
    ),
}


@pytest.mark.parametrize("saver", PREFIXES)
def test_names_of_what_saved_the_model_lead_to_the_same_tensors(
    saver: str, saved: Path, folder: Path
) -> None:
    expected = open_checkpoint(saved)
    spec, sources = describe(expected)
    checkpoint = open_checkpoint(rename(folder, PREFIXES[saver]))
    other_spec, other_sources = describe(checkpoint)
    assert (other_spec, other_sources) == (spec, sources)
    for name, source in sources.items():
        assert np.array_equal(checkpoint.read(source), expected.read(source)), name
    (note,) = checkpoint.notes
    changed = [key for key in sorted(expected.tensors) if PREFIXES[saver](key) != key]
    first = min(changed, key=lambda key: (not key.startswith("model."), PREFIXES[saver](key)))
    assert note.endswith(f": {PREFIXES[saver](first)} is read as {first}")
    assert expected.notes == ()


def test_what_automodel_saves_is_read_as_transformers_loads_it(folder: Path) -> None:
    tied = make_model("qwen3_moe", tie_word_embeddings=True)
    shutil.rmtree(folder)
    tied.model.save_pretrained(folder)
    assert "embed_tokens.weight" in weights(folder)
    checkpoint = open_checkpoint(folder)
    _, sources = describe(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gate = loaded.model.layers[0].mlp.experts.gate_up_proj[3].chunk(2)[0].detach()
    read = checkpoint.read(sources[parse_name("layers.0.ffn.experts.3.gate.weight")])
    assert np.array_equal(read, gate.half().numpy())


@pytest.mark.parametrize("saver", ["AutoModel", "FSDP", "a vision model of transformers 4"])
def test_the_golden_of_other_names_is_the_original_models(
    saver: str, model: PreTrainedModel, folder: Path
) -> None:
    rename(folder, PREFIXES[saver])
    out = folder / "golden.safetensors"
    capture_golden(open_checkpoint(folder), layers=(0, 1), prompts=[[5, 6, 7]], out=out)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0].numpy()
    assert np.abs(read_golden(out).logits - expected).max() < 1e-4


def test_two_decoders_are_named_and_neither_is_taken(folder: Path) -> None:
    tensors = weights(folder)
    both = {
        f"{part}.{key}": tensors[key].clone() for key in tensors for part in ("actor", "critic")
    }
    said = refusal(store(folder, both))
    assert "more than one decoder, under 'actor.model.', 'critic.model.'" in said
    assert "found: actor.lm_head.weight, actor.model.embed_tokens.weight" in said


def test_an_unknown_name_shows_what_is_there_and_not_what_is_missing(folder: Path) -> None:
    said = refusal(rename(folder, lambda key: key.replace("model.layers", "transformer.blocks")))
    lacking, _, found = said.partition("; found: ")
    assert "lacks" in lacking and "model.layers.0." in lacking
    assert "transformer.blocks.0" in found and "model.layers" not in found


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
        ("model.layers.0.block_sparse_moe.switch_mlp.gate_proj.weight", "mlx-lm's names"),
        ("layers.0.attention.wq.weight", "Meta's or Mistral's own layout"),
        ("blk.0.attn_q.weight", "GGUF's names"),
    ],
)
def test_names_that_tell_who_wrote_them_are_said(there: str, said: str, folder: Path) -> None:
    tensors = weights(folder)
    tensors[there] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    answer = refusal(store(folder, tensors))
    assert said in answer and f"found: {there}" in answer


def test_an_untied_model_without_its_head_is_told_of_tying(folder: Path) -> None:
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    said = refusal(store(folder, tensors))
    assert "lacks 1 tensor that its config.json implies: lm_head.weight; found: the other" in said
    assert "set tie_word_embeddings to true" in said
    edit_config(folder, tie_word_embeddings=True)
    _, sources = describe(open_checkpoint(folder))
    assert sources[HEAD].key == "model.embed_tokens.weight"


# --- tensors beside the model

BESIDE = {
    "visual.blocks.0.attn.qkv.weight": "a vision tower",
    "model.visual.patch_embed.proj.weight": "a vision tower",
    "vision_tower.vision_model.embeddings.class_embedding": "a vision tower",
    "multi_modal_projector.linear_1.weight": "a projector of images or sound",
    "audio_tower.conv1.weight": "an audio tower",
    "mtp.layers.0.input_layernorm.weight": "heads that predict further tokens",
    "v_head.summary.weight": "a value head of reinforcement learning",
    "model.layers.0.self_attn.rotary_emb.inv_freq": "rotary buffers, which are computed",
}


def test_known_parts_beside_the_model_are_left_out_by_name_as_transformers_does(
    model: PreTrainedModel, folder: Path
) -> None:
    store(folder, weights(folder) | {key: torch.ones(3) for key in BESIDE})
    checkpoint = open_checkpoint(folder)
    _, sources = describe(checkpoint)
    left_out = checkpoint.left_out(sources)
    assert {name: why for why, names in left_out.items() for name in names} == BESIDE
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_what_is_left_out_is_printed_and_recorded_and_verify_asks_no_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"visual.norm.weight": torch.ones(3), "score.weight": torch.ones(2, 72)}
    store(folder, weights(folder) | odd)
    out = tmp_path / "out"
    code, printed = ran(capsys, "convert", folder, out)
    assert code == 2
    assert "its config.json does not account for; found: score.weight" in printed
    assert "--ignore-tensors 'score.weight' leaves them out" in printed
    arguments = ["--layers", "0", "--ignore-tensors", "score.*"]
    code, printed = ran(capsys, "convert", folder, out, *arguments, "--prefill", 0, "--workers", 1)
    assert code == 0, printed
    assert "left out: 1 tensor of the checkpoint, a vision tower: visual.norm.weight" in printed
    assert "left out: 1 tensor of the checkpoint, --ignore-tensors: score.weight" in printed
    kinds = {"a vision tower": ("visual.norm.weight",), "--ignore-tensors": ("score.weight",)}
    assert read_manifest(out).left_out == kinds
    (tmp_path / "prompts.json").write_text("[[5, 6, 7]]")
    assert verify(out, checkpoint=folder, prompts=tmp_path / "prompts.json").passed


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        (["score.weight"], "score.weight"),
        (["value.a.weight", "value.b.weight"], "value.*"),
        (["model.layers.2.a.weight", "model.layers.2.b.weight"], "model.layers.2.*"),
    ],
)
def test_the_pattern_offered_is_one_that_works(
    extra: list[str], pattern: str, folder: Path
) -> None:
    store(folder, weights(folder) | {name: torch.ones(3) for name in extra})
    assert f"--ignore-tensors '{pattern}'" in refusal(folder)
    found = plan(folder, ConvertOptions(ignore_tensors=(pattern,))).source.left_out
    assert found == {"--ignore-tensors": tuple(extra)}


def test_what_is_ignored_is_ignored_where_sizes_are_chosen_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(folder, weights(folder) | {"extra.weight": torch.ones(3)})
    command = ["convert", folder, tmp_path / "out", "--dry-run", "--target", "m4-max"]
    code, printed = ran(capsys, *command)
    assert code == 2 and "found: extra.weight" in printed
    code, printed = ran(capsys, *command, "--ignore-tensors", "extra.*")
    assert code == 0, printed


def test_a_pattern_never_takes_a_tensor_that_is_needed(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor is left over .*'model\.norm\.\*'.*none left"):
        plan(folder, ConvertOptions(ignore_tensors=("model.norm.*",)))


# --- the vocabulary


@pytest.mark.parametrize("rows", [205, 224])
def test_a_resized_vocabulary_says_which_vocab_size_to_set(rows: int, tmp_path: Path) -> None:
    resized = make_model("mixtral", num_hidden_layers=2)
    resized.resize_token_embeddings(rows)
    save_checkpoint(resized, tmp_path)
    right = read_config(tmp_path)["vocab_size"]
    assert right == rows
    said = refusal(edit_config(tmp_path, vocab_size=211))
    assert "vocab_size 211 is stale" in said and f"set vocab_size to {rows}" in said
    assert f"model.embed_tokens.weight has {rows} rows, lm_head.weight has {rows} rows" in said
    edit_config(tmp_path, vocab_size=rows)
    assert describe(open_checkpoint(tmp_path))[0].vocab == rows


def test_two_vocabularies_in_one_model_are_told_apart(folder: Path) -> None:
    tensors = weights(folder)
    tensors["lm_head.weight"] = torch.ones(220, 72)
    assert "embedding and head are of two vocabularies" in refusal(store(folder, tensors))


# --- quantised forms

FORMS: dict[str, dict[str, Any]] = {
    "mlx 4 bit, group 64": {"quantization": {"group_size": 64, "bits": 4}},
    "mlx 4 bit, mxfp4, group 32": {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
    "mlx 8 bit, group 32": {"quantization_config": {"group_size": 32, "bits": 8, "mode": "affine"}},
    "gptq 4 bit, group 128": {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    },
    "awq 4 bit, group 128": {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}
    },
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}},
    "bitsandbytes 4 bit, nf4": {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        }
    },
    "bitsandbytes 8 bit": {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "bnb_4bit_quant_type": "fp4",
        }
    },
    "compressed-tensors, nvfp4-pack-quantized": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
        }
    },
    "modelopt, NVFP4": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    "torchao": {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}},
}


UNREAD = ("torchao", "bitsandbytes 8 bit")


@pytest.mark.parametrize("form", FORMS)
def test_every_quantised_form_is_called_by_its_name(form: str, folder: Path) -> None:
    """The weights are plain, whatever the config says."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | FORMS[form]))
    message = refusal(folder)
    assert f"is quantised ({form})" in message and "dequantise" in message


@pytest.mark.parametrize("form", FORMS)
def test_a_config_alone_is_refused_where_its_form_is_not_read(form: str, saved: Path) -> None:
    values = read_config(saved) | FORMS[form]
    if form not in UNREAD:
        assert describe_config(values) == describe_config(read_config(saved))
        return
    with pytest.raises(UserError, match="is quantised"):
        describe_config(values)


SIDE_FILES = {
    "hf_quant_config.json": (
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16}},
        "modelopt, NVFP4, group 16",
    ),
    "quantize_config.json": (
        {"bits": 4, "group_size": 128, "desc_act": False},
        "gptq 4 bit, group 128",
    ),
    "quant_config.json": (
        {"w_bit": 4, "q_group_size": 128, "version": "GEMM"},
        "awq 4 bit, group 128",
    ),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_form_that_only_a_file_beside_tells_is_named(name: str, folder: Path) -> None:
    content, form = SIDE_FILES[name]
    (folder / name).write_text(json.dumps(content))
    assert f"is quantised ({form})" in refusal(folder)


@pytest.mark.parametrize(
    ("added", "form"),
    [
        ("qweight", "awq or gptq"),
        ("g_idx", "gptq"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "FP8"),
        ("weight.absmax", "bitsandbytes"),
        ("scales", "mlx"),
        ("SCB", "bitsandbytes"),
    ],
)
def test_a_form_that_only_its_tensors_tell_is_named(added: str, form: str, folder: Path) -> None:
    tensors = weights(folder) | {f"model.layers.0.self_attn.q_proj.{added}": torch.ones(3)}
    assert f"is quantised ({form}, by its tensors)" in refusal(store(folder, tensors))


# --- files


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
    ],
)
def test_a_git_lfs_pointer_is_named_with_the_way_to_the_file(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    said = refusal(folder)
    assert str(folder / name) in said and "Git LFS" in said and "`git lfs pull`" in said


def test_a_pointer_for_a_file_that_is_not_read_does_not_matter(folder: Path) -> None:
    for name in ("pytorch_model.bin", "trainer_state.json", "consolidated.safetensors"):
        (folder / name).write_text(POINTER)
    describe(open_checkpoint(folder))


def split(folder: Path) -> Path:
    """The model in two files and an index, and no single file."""
    tensors = weights(folder)
    files = {
        key: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, key in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == file}, folder / file)
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def test_a_stale_single_file_is_read_as_transformers_does_and_said(folder: Path) -> None:
    stale = {key: value + 1 for key, value in weights(folder).items()}
    store(split(folder), stale)
    checkpoint = open_checkpoint(folder)
    _, sources = describe(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = loaded.lm_head.weight.detach().half().numpy()
    assert np.array_equal(checkpoint.read(sources[HEAD]), head)
    (note,) = checkpoint.notes
    assert "model.safetensors was read, as transformers does" in note
    assert "model.safetensors.index.json with its 2 files passed over" in note


def test_a_single_file_that_lacks_tensors_says_that_shards_were_passed_over(folder: Path) -> None:
    one = {"lm_head.weight": weights(folder)["lm_head.weight"]}
    said = refusal(store(split(folder), one))
    assert "with its 2 files passed over: move model.safetensors away" in said
    (folder / "model.safetensors").unlink()
    describe(open_checkpoint(folder))
    assert open_checkpoint(folder).notes == ()


def test_an_index_of_the_single_file_alone_is_nothing_to_speak_of(folder: Path) -> None:
    index = {"weight_map": {key: "model.safetensors" for key in weights(folder)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).notes == ()


def test_an_adapter_beside_the_model_is_not_applied_and_that_is_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, printed = ran(capsys, "convert", folder, tmp_path / "out", "--dry-run")
    assert code == 0
    assert "note: the adapter of adapter_config.json is not applied" in printed


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


FOREIGN: dict[str, tuple[tuple[str, ...], str]] = {
    "an adapter": (("adapter_config.json", "adapter_model.safetensors"), "holds an adapter"),
    "GGML": (("model-q4_0.ggml",), "holds a GGML model.*model-q4_0.ggml.*take a GGUF"),
    "Meta": (("params.json", "consolidated.00.pth"), "original layout"),
    "Mistral": (("params.json", "consolidated.safetensors", "config.json"), "original layout"),
    "pickled": (("config.json", "pytorch_model.bin"), "pickled weights.*save_pretrained"),
    "the cache of a model": (
        ("snapshots/abc/config.json", "snapshots/def/config.json"),
        "snapshots/def",
    ),
    "the cache": (("models--a--b/snapshots/abc/config.json",), "the Hub's cache, with models"),
    "a conversion": (("runtime_meta.json",), "a conversion of ane-moe"),
    "weights alone": (("model.safetensors",), "model.safetensors, and no config.json"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_checkpoint_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    files, said = FOREIGN[kind]
    with pytest.raises(UserError, match=said):
        open_checkpoint(made(tmp_path, *files))


def test_the_cache_of_a_model_gives_the_snapshot_that_main_names(tmp_path: Path) -> None:
    made(tmp_path, "snapshots/abc/config.json", "snapshots/def/config.json", "refs/main")
    (tmp_path / "refs" / "main").write_text("abc\n")
    assert f"give its snapshot: {tmp_path / 'snapshots' / 'abc'}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.ggml", "a GGML model"),
        ("config.json", "give its folder"),
        ("pytorch_model.bin", "pickled weights"),
    ],
)
def test_a_file_in_place_of_a_folder_is_called_what_it_is(
    name: str, said: str, tmp_path: Path
) -> None:
    made(tmp_path, name)
    assert said in refusal(str(tmp_path / name))


def test_json_files_with_a_byte_order_mark_are_read_and_the_golden_too(
    model: PreTrainedModel, folder: Path
) -> None:
    split(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text, encoding="utf-8-sig")
        assert (folder / name).read_bytes().startswith(b"\xef\xbb\xbf")
    spec, _ = describe(open_checkpoint(folder))
    assert spec.vocab == 211
    capture_golden(
        open_checkpoint(folder), layers=(0, 1), prompts=[[5, 6]], out=folder / "golden.safetensors"
    )
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0].numpy()
    assert np.abs(read_golden(folder / "golden.safetensors").logits - expected).max() < 1e-4


def test_a_byte_order_mark_before_the_config_leaves_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    own = Path(shutil.copytree(demo_checkpoint(), tmp_path / "own"))
    expected = AutoTokenizer.from_pretrained(own)("class Reader:")["input_ids"]
    text = (own / "config.json").read_text()
    (own / "config.json").write_text(text, encoding="utf-8-sig")
    tokenizer = read_tokenizer(own)
    assert tokenizer is not None and tokenizer.encode("class Reader:") == expected


def test_transformers_own_names_on_disk_stay_as_they_are(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save_fused(model, tmp_path))
    assert checkpoint.notes == ()
    assert all(name == tensor.key for name, tensor in checkpoint.tensors.items())


# --- values beyond fp16


def test_int8_cannot_hold_what_fp16_cannot_and_the_message_says_so(
    folder: Path, tmp_path: Path
) -> None:
    """coremltools: the expanded weight has the type of its scale."""
    from coremltools import target as AvailableTarget
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    data = np.array([[127]], np.int8)

    @mb.program(
        input_specs=[mb.TensorSpec((1, 1), dtype=types.fp16)], opset_version=AvailableTarget.iOS18
    )
    def program(x: Any) -> Any:
        scale = np.array([[70000 / 127]], np.float16)
        return mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(data=data, scale=scale))

    expanded = program.functions["main"].find_ops(op_type="constexpr_blockwise_shift_scale")[0]
    assert expanded.outputs[0].dtype == types.fp16
    with np.errstate(over="ignore"):
        assert np.isinf(data.astype(np.float16) * np.float16(70000 / 127))
    tensors = weights(folder)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 70000.0
    store(folder, tensors)
    with pytest.raises(UserError, match=r"overflows fp16.*1 value above.*no --compress format"):
        convert(folder, tmp_path / "out", ConvertOptions(layers=(0,)))


def test_a_pair_scaled_by_a_power_of_two_computes_the_same(tmp_path: Path) -> None:
    """What the message on overflow advises, by transformers' own forward."""
    model = make_model("mixtral", num_hidden_layers=1)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj[:, experts.gate_up_proj.shape[1] // 2 :] /= 4
        experts.down_proj *= 4
        assert torch.equal(model(ids).logits, before)
