"""What each family says of its architecture, against the modules and the behaviour of transformers'
own models.

Families of another shape than Llama's have tests of their own beside these.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.families import describe, supported
from ane_moe.model.spec import ModelSpec, MoeSpec
from tests.models import (
    FAMILIES,
    LLAMA_SHAPED,
    RESEARCH,
    VARIANTS,
    edit_config,
    make_model,
    make_variant,
    save_checkpoint,
    with_old_config_names,
)
from tests.zoo import ROWS

MODELS = [*LLAMA_SHAPED, *VARIANTS]


def build(name: str, folder: Path) -> tuple[PreTrainedModel, ModelSpec]:
    model = make_variant(name) if name in VARIANTS else make_model(name)
    return model, describe(open_checkpoint(save_checkpoint(model, folder)))[0]


def test_the_supported_families_are_the_ones_under_test() -> None:
    assert supported() == sorted({*FAMILIES, *ROWS, *RESEARCH})


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_the_modules(name: str, tmp_path: Path) -> None:
    model, spec = build(name, tmp_path)
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        theirs, ours = module.self_attn, layer.mixer
        assert (ours.heads, ours.kv_heads) == (
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
        )
        assert ours.head_dim == theirs.head_dim
        assert ours.scale == theirs.scaling
        assert ours.qkv_bias == (theirs.q_proj.bias is not None)
        assert ours.o_bias == (theirs.o_proj.bias is not None)
        assert ours.clip_qkv == getattr(model.config, "clip_qkv", None)
        norm = getattr(theirs, "q_norm", None)
        if norm is None:
            assert ours.qk_norm == "none"
        else:
            assert (
                ours.qk_norm
                == {ours.head_dim: "head", ours.head_dim * ours.heads: "full"}[len(norm.weight)]
            )
            assert ours.qk_norm_eps == norm.variance_epsilon
        for norm in (module.input_layernorm, module.post_attention_layernorm, model.model.norm):
            assert spec.norm.eps == norm.variance_epsilon


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_sees_the_tokens_that_the_model_attends_to(name: str, tmp_path: Path) -> None:
    model, spec = build(name, tmp_path)
    tokens = 40
    with torch.no_grad():
        attentions = model(torch.arange(tokens)[None], output_attentions=True).attentions
    for layer, attention in zip(spec.layers, attentions, strict=True):
        seen = (attention[0] > 0).any(0).sum(-1)
        window = layer.mixer.window or tokens
        assert seen.tolist() == [min(token + 1, window) for token in range(tokens)]


@pytest.mark.parametrize("name", MODELS)
def test_rotary_tables_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model, spec = build(name, tmp_path)
    for layer in spec.layers:
        assert layer.mixer.rope is not None
        rope = spec.ropes[layer.mixer.rope]
        np.testing.assert_allclose(
            rope.inv_freq, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
        )
        assert rope.attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)


@pytest.mark.parametrize("name", MODELS)
def test_routing_is_that_of_the_router_module(name: str, tmp_path: Path) -> None:
    model, spec = build(name, tmp_path)
    x = torch.randn(50, spec.d_model)
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        block = getattr(module, "block_sparse_moe", None) or module.mlp
        assert isinstance(layer.ffn, MoeSpec) == hasattr(block, "experts")
        if not isinstance(layer.ffn, MoeSpec):
            assert layer.ffn.width == block.down_proj.in_features
            continue
        router = block.router if hasattr(block, "router") else block.gate
        with torch.no_grad():
            logits, weights, chosen = router(x)
            scores = torch.softmax(logits, -1)
            expected, indices = scores.topk(layer.ffn.router.k)
        if layer.ffn.router.renorm:
            expected = expected / expected.sum(-1, keepdim=True)
        assert layer.ffn.router.experts == logits.shape[-1]
        assert torch.equal(indices, chosen)
        torch.testing.assert_close(weights, expected)
        assert layer.ffn.expert.width == block.experts.down_proj.shape[-1]
        shared = getattr(block, "shared_expert", None)
        assert (layer.ffn.shared is None) == (shared is None)
        if layer.ffn.shared is not None:
            assert layer.ffn.shared.gated
            assert layer.ffn.shared.mlp.width == block.shared_expert.down_proj.in_features


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_sizes_and_multipliers_are_those_of_the_config(name: str, tmp_path: Path) -> None:
    model, spec = build(name, tmp_path)
    config = model.config
    assert spec.family == config.model_type
    assert (spec.vocab, spec.d_model) == model.model.embed_tokens.weight.shape
    assert spec.context == config.max_position_embeddings
    head = model.score if spec.head.labels else model.lm_head
    assert spec.head.tied == (head.weight is model.model.embed_tokens.weight)
    assert spec.scores == len(head.weight)
    assert spec.head.bias == (head.bias is not None)
    assert spec.head.logit_scale == 1 / getattr(config, "logits_scaling", 1)
    assert spec.embed_scale == getattr(config, "embedding_multiplier", 1)
    assert spec.residual_scale == getattr(config, "residual_multiplier", 1)
    assert (spec.bos_id, spec.eos_ids) == (config.bos_token_id, (config.eos_token_id,))


@pytest.mark.parametrize("name", MODELS)
def test_older_config_names_mean_the_same(name: str, tmp_path: Path) -> None:
    _, spec = build(name, tmp_path)
    assert describe(open_checkpoint(with_old_config_names(tmp_path)))[0] == spec


def test_the_windows_of_a_qwen2_moe_file_without_layer_types_are_derived(tmp_path: Path) -> None:
    _, spec = build("qwen2_moe with windows", tmp_path)
    edit_config(tmp_path, remove=("layer_types",))
    assert describe(open_checkpoint(tmp_path))[0] == spec
    assert [layer.mixer.window for layer in spec.layers] == [17, None, None]


def test_stop_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    build("olmoe", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert describe(open_checkpoint(tmp_path))[0].eos_ids == (7, 9)
    (tmp_path / "generation_config.json").unlink()
    assert describe(open_checkpoint(tmp_path))[0].eos_ids == (2,)
