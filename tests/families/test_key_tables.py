"""The key tables, against the weights that Hugging Face itself loads and the names it itself
converts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ane_moe.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ane_moe.checkpoints.key_names import model_names
from ane_moe.errors import UserError
from ane_moe.families import describe, load_family
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import EMBEDDING, HEAD
from tests.models import (
    FAMILIES,
    LLAMA_SHAPED,
    VARIANTS,
    edit_config,
    make_model,
    make_variant,
    read_config,
    save_checkpoint,
    save_fused,
)
from tests.zoo import ROWS

MODELS = [*FAMILIES, *VARIANTS]

# Our names -> where transformers keeps them at run time, gate and up stacked in one tensor.
RUNTIME = (
    (r"embed\.weight", "model.embed_tokens.weight"),
    (r"head\.norm\.weight", "model.norm.weight"),
    (r"head\.rows\.weight", "lm_head.weight"),
    (r"layers\.(\d+)\.attn\.norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn\.norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.attn\.([qk]_norm)\.weight", r"model.layers.\1.self_attn.\2.weight"),
    (r"layers\.(\d+)\.attn\.([qkvo])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"layers\.(\d+)\.ffn\.router\.weight", r"model.layers.\1.MOE.ROUTER.weight"),
    (
        r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(gate|up)\.weight",
        r"model.layers.\1.MOE.experts.gate_up_proj",
    ),
    (r"layers\.(\d+)\.ffn\.experts\.(\d+)\.down\.weight", r"model.layers.\1.MOE.experts.down_proj"),
    (
        r"layers\.(\d+)\.ffn\.shared\.(\w+)\.weight",
        r"model.layers.\1.mlp.shared_expert.\2_proj.weight",
    ),
    (r"layers\.(\d+)\.ffn\.shared_gate\.weight", r"model.layers.\1.mlp.shared_expert_gate.weight"),
    (r"layers\.(\d+)\.ffn\.mlp\.(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)
# What is kept elsewhere in families of another shape.
CCA, EDA = r"model.layers.\1.self_attn.qkv_proj", r"model.layers.\1.mlp.gate"
AFTER_ATTENTION = r"model.layers.\1.post_attention_residual_scale"
AFTER_FFN = r"model.layers.\1.post_mlp_residual_scale"
OTHERS = {
    "zaya": (
        (r"layers\.0\.attn\.entry\.(bias|scale)", r"model.input_hidden_states_\1"),
        (r"layers\.(\d+)\.attn\.v_(current|delayed)\.weight", rf"{CCA}.v_proj_\2.weight"),
        (r"layers\.(\d+)\.attn\.([qk])\.weight", rf"{CCA}.\2_proj.weight"),
        (r"layers\.(\d+)\.attn\.by_channel\.(weight|bias)", rf"{CCA}.conv_qk_depthwise.\2"),
        (r"layers\.(\d+)\.attn\.by_head\.(weight|bias)", rf"{CCA}.conv_qk_grouped.\2"),
        (r"layers\.(\d+)\.attn\.temperature\.weight", r"model.layers.\1.self_attn.qk_norm.temp"),
        (r"layers\.(\d+)\.attn\.residual\.added_(\w+)", rf"{AFTER_ATTENTION}.hidden_states_\2"),
        (r"layers\.(\d+)\.attn\.residual\.stream_(\w+)", rf"{AFTER_ATTENTION}.residual_\2"),
        (r"layers\.(\d+)\.ffn\.residual\.added_(\w+)", rf"{AFTER_FFN}.hidden_states_\2"),
        (r"layers\.(\d+)\.ffn\.residual\.stream_(\w+)", rf"{AFTER_FFN}.residual_\2"),
        (r"layers\.(\d+)\.ffn\.router\.choice_bias", rf"{EDA}.balancing_biases"),
        (r"layers\.(\d+)\.ffn\.router\.carry_scale", rf"{EDA}.router_states_scale"),
        (r"layers\.(\d+)\.ffn\.router\.down\.(weight|bias)", rf"{EDA}.down_proj.\2"),
        (r"layers\.(\d+)\.ffn\.router\.out\.weight", rf"{EDA}.router_mlp.out_proj.weight"),
        (r"layers\.(\d+)\.ffn\.router\.(norm|fc1|fc2)\.(weight|bias)", rf"{EDA}.router_mlp.\2.\3"),
    ),
    "lfm2_moe": (
        (r"head\.norm\.weight", "model.embedding_norm.weight"),
        (r"layers\.(\d+)\.attn\.norm\.weight", r"model.layers.\1.operator_norm.weight"),
        (r"layers\.(\d+)\.ffn\.norm\.weight", r"model.layers.\1.ffn_norm.weight"),
        (
            r"layers\.(\d+)\.attn\.([qk])_norm\.weight",
            r"model.layers.\1.self_attn.\2_layernorm.weight",
        ),
        (r"layers\.(\d+)\.attn\.[bcu]\.weight", r"model.layers.\1.conv.in_proj.weight"),
        (r"layers\.(\d+)\.attn\.conv\.weight", r"model.layers.\1.conv.conv.weight"),
        (r"layers\.([02])\.attn\.o\.weight", r"model.layers.\1.conv.out_proj.weight"),
        (r"layers\.([13])\.attn\.o\.weight", r"model.layers.\1.self_attn.out_proj.weight"),
        (r"layers\.(\d+)\.ffn\.mlp\.gate\.weight", r"model.layers.\1.feed_forward.w1.weight"),
        (r"layers\.(\d+)\.ffn\.mlp\.up\.weight", r"model.layers.\1.feed_forward.w3.weight"),
        (r"layers\.(\d+)\.ffn\.mlp\.down\.weight", r"model.layers.\1.feed_forward.w2.weight"),
        (r"layers\.(\d+)\.ffn\.router\.choice_bias", r"model.layers.\1.feed_forward.expert_bias"),
    ),
}
FILTER = r"model.layers.\1.mlp.experts"
OTHERS["openai_privacy_filter"] = (
    (r"head\.rows\.(weight|bias)", r"score.\1"),
    (r"layers\.(\d+)\.attn\.sinks\.weight", r"model.layers.\1.self_attn.sinks"),
    (r"layers\.(\d+)\.ffn\.router\.bias", r"model.layers.\1.mlp.router.bias"),
    (r"layers\.(\d+)\.ffn\.experts\.\d+\.(?:gate|up)\.bias", f"{FILTER}.gate_up_proj_bias"),
    (r"layers\.(\d+)\.ffn\.experts\.\d+\.down\.bias", f"{FILTER}.down_proj_bias"),
)
BIASED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"qkv_bias": True},
    "lfm2_moe": {"conv_bias": True},
    "zaya": {},
}
WITH_QUERY_LATENTS = (
    *("axk1", "deepseek_v32", "dots3_note", "glm_moe_dsa", "kimi_k25", "longcat_flash"),
)
BLOCKS = {
    "granitemoe": ("block_sparse_moe", "router"),
    "lfm2_moe": ("feed_forward", "gate"),
    "openai_privacy_filter": ("mlp", "router"),
}


def build(name: str) -> PreTrainedModel:
    return make_variant(name) if name in VARIANTS else make_model(name)


def runtime_tensor(model: PreTrainedModel, name: str) -> torch.Tensor:
    family = model.config.model_type
    rows = (*OTHERS.get(family, ()), *RUNTIME)
    key = next(re.sub(ours, theirs, name) for ours, theirs in rows if re.fullmatch(ours, name))
    moe, router = BLOCKS.get(family, ("mlp", "gate"))
    key = key.replace("MOE", moe).replace("ROUTER", router)
    tensor = model.state_dict()[key]
    if found := re.search(r"experts\.(\d+)\.(gate|up|down)", name):
        tensor = tensor[int(found[1])]
        if family == "openai_privacy_filter" and tensor.dim() == 2:
            tensor = tensor.T
        if found[2] != "down":
            tensor = tensor.chunk(2)[found[2] == "up"]
    if run := re.search(r"attn\.([bcu])\.weight", name):
        tensor = tensor.chunk(3)["bcu".index(run[1])]
    if family == "openai_privacy_filter" and re.search(r"attn\.[qk]\.", name):
        head = model.config.head_dim
        order = [*range(0, head, 2), *range(1, head, 2)]  # firsts of all pairs, then seconds
        heads = range(0, len(tensor), head)
        tensor = tensor[[first + place for first in heads for place in order]]
    return tensor


def assert_reads_what_transformers_holds(
    checkpoint: Checkpoint, model: PreTrainedModel
) -> ModelSpec:
    spec, sources = describe(checkpoint)
    assert list(sources) == [name for name, _ in spec.weights()]
    for name, source in sources.items():
        expected = runtime_tensor(model, str(name))
        if str(name).endswith("choice_bias"):  # of which differences alone count
            expected = expected - expected.max()
        assert source.shape == tuple(expected.shape), name
        plain = checkpoint.read(replace(source, scale=1.0))
        assert np.array_equal(plain, expected.half().numpy()), name
        assert np.array_equal(checkpoint.read(source), (expected * source.scale).half().numpy()), (
            name
        )
    return spec


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_the_one_transformers_holds(name: str, tmp_path: Path) -> None:
    model = build(name)
    assert_reads_what_transformers_holds(open_checkpoint(save_checkpoint(model, tmp_path)), model)


@pytest.mark.parametrize("name", MODELS)
def test_stacked_experts_on_disk_are_read_as_well(name: str, tmp_path: Path) -> None:
    model = build(name)
    assert_reads_what_transformers_holds(open_checkpoint(save_fused(model, tmp_path)), model)


@pytest.mark.parametrize("family", [*FAMILIES, *ROWS])
def test_transformers_gives_every_key_of_the_tables_to_a_tensor_of_its_model(family: str) -> None:
    conversions = get_checkpoint_conversion_mapping(family) or []
    conversions = [*conversions, *(get_checkpoint_conversion_mapping(f"{family}_text") or [])]
    model = make_model(family)
    decoder = type(getattr(model.base_model, "language_model", model)).__name__
    conversions += get_checkpoint_conversion_mapping(decoder) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    dense = make_model(family, mlp_only_layers=[0]) if family.startswith("qwen") else model
    biased: dict[str, Any] = BIASED.get(family, {"attention_bias": True})
    models = [model, dense, make_model(family, **biased)]
    if family in ROWS:
        models += [make_model(family, **changes) for changes in ROWS[family].variants.values()]
    names = (name for one in models for name in model_names(one.state_dict()).values())
    held = {name.replace(".language_model.", ".") for name in names}
    never = {
        "attn.o.bias",
        "q_norm",
        "k_norm",
        "bias",
    }  # of the shared skeleton, where a family has no such part
    never |= {"attn.v.weight"} if family == "zaya" else set()
    # DeepSeek-V3's queries without a latent, which none has
    if family in WITH_QUERY_LATENTS:
        never |= {"attn.q_nope", "attn.q_rotated"}
    for ours, entries in load_family(family).KEYS.items():  # type: ignore[attr-defined]
        for entry in entries:
            stored = entry if isinstance(entry, str) else entry.key
            numbers = [{"layer": n // 2, "half": n % 2, "group": n // 2} for n in range(8)]
            keys = [stored.format(expert=1, **each) for each in numbers]
            renamed = [
                rename_source_key(key, renamings, converters)[0].replace(".language_model.", ".")
                for key in keys
            ]
            single = re.search(
                r"experts\.\{expert\}\.(gate_up|down)_proj$", stored
            )  # a form transformers converts
            # transformers goes back to a name whose new one its model has not got
            assert held & {*renamed, *keys} or single or any(part in ours for part in never), (
                ours,
                keys,
                renamed,
            )


@pytest.mark.parametrize("name", ["granitemoe", "granitemoe untied"])
def test_multipliers_are_folded_where_the_values_flow(name: str, tmp_path: Path) -> None:
    _, sources = describe(open_checkpoint(save_checkpoint(build(name), tmp_path)))
    scales = {
        str(source_name): source.scale
        for source_name, source in sources.items()
        if source.scale != 1
    }
    folded = {re.sub(r"\d+", "N", source_name): scale for source_name, scale in scales.items()}
    expected = {
        "embed.weight": 12.0,
        "layers.N.attn.o.weight": 0.22,
        "layers.N.attn.o.bias": 0.22,
        "layers.N.ffn.experts.N.down.weight": 0.22,
        "head.norm.weight": 1 / 6,
    }
    if name == "granitemoe untied":
        del expected["layers.N.attn.o.bias"]
    assert folded == expected


def test_a_tied_head_takes_the_stored_head_when_there_is_one(tmp_path: Path) -> None:
    """transformers does not tie two stored tensors that differ."""
    model = make_model("qwen3_moe", tie_word_embeddings=True)
    save_checkpoint(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    _, sources = describe(checkpoint)
    loaded = type(model).from_pretrained(tmp_path)
    assert np.array_equal(
        checkpoint.read(sources[HEAD]), loaded.lm_head.weight.detach().half().numpy()
    )
    embedding = loaded.model.embed_tokens.weight.detach()
    assert np.array_equal(checkpoint.read(sources[EMBEDDING]), embedding.half().numpy())


def test_a_tied_model_saved_by_its_head_alone_is_read(tmp_path: Path) -> None:
    model = make_model("qwen3_moe", tie_word_embeddings=True)
    save_checkpoint(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_reads_what_transformers_holds(open_checkpoint(tmp_path), model)


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    model = make_model("mixtral")
    save_checkpoint(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_reads_what_transformers_holds(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_missing_tensors_are_named_and_counted(family: str, tmp_path: Path) -> None:
    save_checkpoint(make_model(family), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        del tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lacks 3 tensors.*model\.layers\.0\.self_attn\.v_proj\.weight"
    ):
        describe(open_checkpoint(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_the_config_does_not_count_are_an_error(family: str, tmp_path: Path) -> None:
    save_checkpoint(make_model(family), tmp_path)
    kinds = read_config(tmp_path).get("layer_types")
    edit_config(tmp_path, num_hidden_layers=2, **({"layer_types": kinds[:2]} if kinds else {}))
    with pytest.raises(
        UserError,
        match=r"holds \d+ tensors that its config.json does not account.*layers\.2\..*more",
    ):
        describe(open_checkpoint(tmp_path))


@pytest.mark.parametrize(("field", "key"), [("attention_bias", "bias"), ("qkv_bias", "bias")])
def test_biases_that_the_config_denies_are_an_error(field: str, key: str, tmp_path: Path) -> None:
    save_checkpoint(
        make_model({"attention_bias": "granitemoe", "qkv_bias": "qwen2_moe"}[field]), tmp_path
    )
    edit_config(tmp_path, **{field: False})
    with pytest.raises(UserError, match=key):
        describe(open_checkpoint(tmp_path))


def test_an_underived_head_dim_is_named_when_the_shapes_show_it(tmp_path: Path) -> None:
    save_checkpoint(make_model("qwen3_moe"), tmp_path)
    edit_config(tmp_path, remove=("head_dim",))
    with pytest.raises(UserError, match=r"wrong shape.*head_dim"):
        describe(open_checkpoint(tmp_path))


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_checkpoint(make_model("olmoe"), tmp_path)
    edit_config(tmp_path, intermediate_size=33)
    with pytest.raises(
        UserError,
        match=r"experts\.0\.gate_proj\.weight has the wrong shape.*\[32, 72\].*\[33, 72\]",
    ):
        describe(open_checkpoint(tmp_path))
