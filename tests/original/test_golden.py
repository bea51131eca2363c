"""The golden is what `from_pretrained` computes, without the model ever being in memory whole."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.opened import open_model
from ane_moe.original import stream as hf_stream
from ane_moe.original.capture import capture_golden
from ane_moe.original.golden import Golden, LayerGolden, read_golden, write_golden
from tests.adapters import adapt
from tests.models import LLAMA_SHAPED, make_model, make_variant, save_checkpoint, save_fused
from tests.zoo import FULL

MAX_DIFFERENCE = 2e-6
PROMPTS = [[5, 7, 11, 13, 17, 19, 23], [1], list(range(3, 40))]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def captured(folder, layers=(0, 1, 2), prompts=PROMPTS):
    capture_golden(
        open_checkpoint(folder), layers=layers, prompts=prompts, out=folder / "golden.safetensors"
    )
    return read_golden(folder / "golden.safetensors")


def assert_agrees_with_from_pretrained(golden, folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for ids, span in zip(golden.prompts, golden.spans, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True, output_router_logits=True)
        assert np.abs(out.logits[0].numpy() - golden.logits[span]).max() <= MAX_DIFFERENCE
        routers = iter(out.router_logits)
        for index, layer in golden.layers.items():
            expected = out.hidden_states[index][0].numpy()
            assert np.abs(expected - layer.x[span]).max() <= MAX_DIFFERENCE
            if layer.router_probs is not None:
                probs = next(routers).softmax(-1)
                assert np.abs(probs.numpy() - layer.router_probs[span]).max() <= MAX_DIFFERENCE
                k = layer.router_indices.shape[1]
                assert (
                    probs.topk(k).indices.sort().values.numpy()
                    == np.sort(layer.router_indices[span], 1)
                ).all()
        for index in range(len(golden.layers) - 1):
            assert (
                np.abs(golden.layers[index].y - golden.layers[index + 1].x).max() <= MAX_DIFFERENCE
            )


def test_what_is_made_of_a_tensor_is_found_by_the_name_in_its_file_too(tmp_path):
    """Nemotron-H's files have another name for it than transformers' modules."""
    model = make_model("nemotron_h", moe_latent_size=56, layers_block_type=["moe", FULL])
    folder, modules = save_checkpoint(model, tmp_path / "checkpoint"), ["fc1_latent_proj", "q_proj"]
    adapted = adapt(model, tmp_path / "adapter", target_modules=modules)
    checkpoint = open_model(folder, adapters=[tmp_path / "adapter"]).checkpoint
    out = tmp_path / "golden.safetensors"
    capture_golden(checkpoint, layers=(0, 1), prompts=PROMPTS[:1], out=out)
    with torch.no_grad():
        expected = adapted(torch.tensor(PROMPTS[:1])).logits[0].numpy()
    assert np.abs(read_golden(out).logits - expected).max() < 1e-5


@pytest.mark.parametrize("save", [save_checkpoint, save_fused])
@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_golden_equals_the_ordinary_forward_for_both_on_disk_forms(family, save, tmp_path):
    folder = save(make_model(family), tmp_path)
    assert_agrees_with_from_pretrained(captured(folder), folder)


@pytest.mark.parametrize("save", [save_checkpoint, save_fused])
@pytest.mark.parametrize("family", ["lfm2_moe", "zaya"])
def test_golden_of_another_shape_equals_the_ordinary_forward(family, save, tmp_path):
    model = make_model(family)
    golden = captured(save(model, tmp_path), layers=tuple(range(model.config.num_hidden_layers)))
    for ids, span in zip(golden.prompts, golden.spans, strict=True):
        heard, handles = [], []
        for module in model.modules():
            if type(module).__name__.endswith("Router"):
                handles.append(
                    module.register_forward_hook(lambda *call, own=heard: own.append(call[2]))
                )
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        for handle in handles:
            handle.remove()
        assert np.abs(out.logits[0].numpy() - golden.logits[span]).max() <= MAX_DIFFERENCE
        routers = iter(heard)
        for index, layer in golden.layers.items():
            expected = out.hidden_states[index][0].numpy()
            assert np.abs(expected - layer.x[span]).max() <= MAX_DIFFERENCE
            if layer.router_indices is not None:
                _, weights, chosen = next(routers)[:3]
                skipped = (weights == 0).numpy()  # of ZAYA's class that computes nothing
                theirs = np.where(skipped, model.config.num_experts, chosen.numpy())
                assert (np.sort(theirs, 1) == np.sort(layer.router_indices[span], 1)).all()


@pytest.mark.parametrize(
    "variant",
    ["qwen3_moe tied", "granitemoe untied", "qwen2_moe with windows", "qwen3_moe with yarn"],
)
def test_golden_equals_the_ordinary_forward_for_variants(variant, tmp_path):
    folder = save_checkpoint(make_variant(variant), tmp_path)
    assert_agrees_with_from_pretrained(captured(folder), folder)


def test_golden_of_a_half_precision_checkpoint_is_computed_in_fp32(tmp_path):
    folder = save_checkpoint(make_model("qwen3_moe").to(torch.bfloat16), tmp_path)
    assert_agrees_with_from_pretrained(captured(folder), folder)


def test_golden_of_a_sharded_checkpoint_is_the_same(tmp_path):
    model = make_model("mixtral")
    whole, parts = save_checkpoint(model, tmp_path / "whole"), tmp_path / "parts"
    model.save_pretrained(parts, max_shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert np.array_equal(captured(whole).logits, captured(parts).logits)


def test_blocks_add_up_and_the_delta_holds_the_residual_multiplier(tmp_path):
    model = make_model("granitemoe")
    golden = captured(save_checkpoint(model, tmp_path), layers=(0,))
    layer, span = golden.layers[0], golden.spans[2]
    with torch.no_grad():
        normed = model.model.layers[0].post_attention_layernorm(
            torch.tensor(layer.middle[span])[None]
        )
        expected = (
            model.config.residual_multiplier * model.model.layers[0].block_sparse_moe(normed)[0]
        )
    assert np.abs(expected.numpy() - layer.ffn_delta[span]).max() <= MAX_DIFFERENCE


def test_a_subset_of_layers_ends_with_the_head_on_the_last_of_them(tmp_path):
    model = make_model("olmoe")
    golden = captured(save_checkpoint(model, tmp_path), layers=(0, 1))
    assert sorted(golden.layers) == [0, 1] and not golden.complete
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(torch.tensor(golden.layers[1].y)))
    assert np.abs(expected.numpy() - golden.logits).max() <= 5 * MAX_DIFFERENCE


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    folder = save_checkpoint(make_model("qwen3_moe"), tmp_path)
    captured(folder)
    first = (folder / "golden.safetensors").read_bytes()
    captured(folder)
    assert (folder / "golden.safetensors").read_bytes() == first
    assert not list(folder.glob(".*"))


def test_without_a_tokenizer_the_built_in_prompts_are_seeded_ids_longer_than_a_prefill_chunk(
    tmp_path,
):
    golden = captured(save_checkpoint(make_model("mixtral"), tmp_path), layers=(0,), prompts=None)
    assert max(map(len, golden.prompts)) > 64 and sum(map(len, golden.prompts)) <= 256


def test_memory_holds_one_layer_and_not_the_model(tmp_path, monkeypatch):
    held = []

    class Watched(hf_stream.StreamedModel):
        def stand_ins(self, outputs):
            parameters = {
                id(one): one.nbytes for one in self.model.parameters() if one.device.type != "meta"
            }
            held.append(sum(parameters.values()))
            return super().stand_ins(outputs)

    monkeypatch.setattr("ane_moe.original.capture.StreamedModel", Watched)
    model = make_model("qwen3_moe", mlp_only_layers=[], num_hidden_layers=12)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    captured(save_checkpoint(model, tmp_path), layers=tuple(range(12)))
    assert layer <= max(held) < 1.2 * layer


@pytest.mark.parametrize(
    ("prompts", "found"),
    [([[1, 211]], "211"), ([[1, -1]], "-1"), ([[]], "0 tokens"), ([[1] * 257], "257 tokens")],
)
def test_prompts_that_do_not_fit_are_named(prompts, found, tmp_path):
    folder = save_checkpoint(make_model("mixtral"), tmp_path)
    with pytest.raises(UserError, match=found):
        captured(folder, prompts=prompts)
    assert not (folder / "golden.safetensors").exists()


def test_a_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_fused(make_model("qwen3_moe"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.q_norm"):
        captured(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_fused(make_model("qwen3_moe"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(71)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight is \(71,\), the model needs \(72,\)"):
        captured(folder)


@pytest.mark.parametrize(
    "damage", ["truncated", "no config", "no weights", "index outside", "quantised"]
)
def test_a_bad_checkpoint_is_one_error(damage, tmp_path):
    folder = save_checkpoint(make_model("mixtral"), tmp_path)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "index outside":
        weights.unlink()  # which transformers would take before the index
        index = {"weight_map": {"a": "../other.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
    with pytest.raises(UserError):
        captured(folder)


def small_golden():
    rng = np.random.default_rng(0)
    layer = LayerGolden(
        *rng.normal(size=(3, 5, 8)).astype(np.float32),
        rng.random((5, 4)).astype(np.float32),
        np.zeros((5, 2), np.int32),
    )
    dense = LayerGolden(*rng.normal(size=(3, 5, 8)).astype(np.float32))
    return Golden(
        ((1, 2, 3), (4, 5)), {0: layer, 1: dense}, rng.normal(size=(5, 11)).astype(np.float32), 2
    )


def test_a_golden_survives_the_disk(tmp_path):
    golden = small_golden()
    write_golden(golden, tmp_path / "g.safetensors")
    read = read_golden(tmp_path / "g.safetensors")
    assert (read.prompts, read.n_layers, sorted(read.layers)) == (golden.prompts, 2, [0, 1])
    assert read.complete and read.layers[1].router_probs is None
    for name, value in vars(golden.layers[0]).items():
        assert np.array_equal(getattr(read.layers[0], name), value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "not safetensors", "of something else"])
def test_a_damaged_golden_says_what_to_do(damage, tmp_path):
    path = tmp_path / "g.safetensors"
    write_golden(small_golden(), path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "not safetensors":
        path.write_bytes(b"hello")
    else:
        save_checkpoint(make_model("mixtral"), tmp_path)
        path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="--checkpoint"):
        read_golden(path)
