"""Fields of config.json that are missing, contradictory or ask for maths that is not
implemented."""

from pathlib import Path
from typing import Any

import pytest

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.errors import UserError
from ane_moe.families import describe, load_family
from tests.models import (
    FAMILIES,
    edit_config,
    make_model,
    read_config,
    save_checkpoint,
    write_config,
)

NEEDED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "hidden_act",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "rope_parameters",
]
NEEDED_BY = {
    "qwen3_moe": "moe_intermediate_size norm_topk_prob attention_bias decoder_sparse_step use_sliding_window"
    " num_local_experts intermediate_size",
    "qwen2_moe": "moe_intermediate_size norm_topk_prob decoder_sparse_step use_sliding_window num_experts"
    " shared_expert_intermediate_size",
    "olmoe": "intermediate_size norm_topk_prob attention_bias clip_qkv num_experts",
    "mixtral": "intermediate_size sliding_window num_local_experts",
    "granitemoe": "intermediate_size attention_bias num_local_experts embedding_multiplier residual_multiplier"
    " attention_multiplier logits_scaling",
    "zaya": "moe_intermediate_size num_experts router_hidden_size head_dim cca_time0 cca_time1",
    "lfm2_moe": "intermediate_size moe_intermediate_size num_experts num_dense_layers conv_L_cache conv_bias"
    " use_expert_bias norm_topk_prob routed_scaling_factor layer_types",
    "openai_privacy_filter": "intermediate_size attention_bias num_local_experts sliding_window"
    " id2label",
}
ELSEWHERE = {
    "lfm2_moe": {"rms_norm_eps": "norm_eps", "hidden_act": "num_experts"},
    "openai_privacy_filter": {"hidden_act": "sliding_window"},
}  # fields by other names


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family; its config.json is restored after every change."""
    return save_checkpoint(make_model(request.param), tmp_path_factory.mktemp(request.param))


def refusal(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> str:
    """What is said of the checkpoint once its config.json is changed so."""
    config = read_config(folder)
    try:
        edit_config(folder, remove, **changes)
        with pytest.raises(UserError) as caught:
            describe(open_checkpoint(folder))
        return str(caught.value)
    finally:
        write_config(folder, config)


def test_every_field_that_the_maths_needs_is_named_when_it_is_missing(family: Path) -> None:
    name = read_config(family)["model_type"]
    for field in [*NEEDED, *NEEDED_BY[name].split()]:
        field = ELSEWHERE.get(name, {}).get(field, field)
        said = refusal(family, remove=(field,))
        assert field in said or (field == "rope_parameters" and "rope_theta" in said), (field, said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 5),
        ("hidden_size", -72),
        ("hidden_size", True),
        ("hidden_size", 72.0),
        ("num_hidden_layers", 10**9),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-6"),
        ("num_experts_per_tok", 100),
        ("tie_word_embeddings", "yes"),
        ("vocab_size", None),
        ("rope_parameters", []),
        ("rope_parameters", [1]),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, -1]),
    ],
)
def test_unusable_values_are_refused_by_name(family: Path, field: str, value: Any) -> None:
    (family / "generation_config.json").unlink(missing_ok=True)
    name = read_config(family)["model_type"]
    if field == "hidden_act" and name in ("lfm2_moe", "openai_privacy_filter"):
        pytest.skip("the family has no such field")
    field = ELSEWHERE.get(name, {}).get(field, field)
    said = refusal(family, **{field: value})
    assert field in said or (field == "rope_parameters" and "rope_theta" in said)


def test_other_rotary_forms_are_refused_by_name(family: Path) -> None:
    zaya = read_config(family)["model_type"] == "zaya"
    for change in ({"rope_type": "longrope"}, {"partial_rotary_factor": 0.3 if zaya else 0.5}):
        table = {"rope_type": "default", "rope_theta": 1e4, **change}
        said = refusal(
            family, rope_parameters={"hybrid": table, "hybrid_sliding": table} if zaya else table
        )
        assert next(iter(change)) in said


@pytest.mark.parametrize("family_name", ["olmoe", "granitemoe"])
def test_windows_are_refused_where_the_family_has_none(family_name: str, tmp_path: Path) -> None:
    save_checkpoint(make_model(family_name), tmp_path)
    assert "sliding_window" in refusal(tmp_path, sliding_window=128)
    assert "layer_types" in refusal(tmp_path, layer_types=["sliding_attention"] * 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["chunked_attention"] * 3},
        {"layer_types": "full"},
        {"mlp_only_layers": 3},
        {"mlp_only_layers": ["0"]},
    ],
)
def test_impossible_layer_lists_are_refused_by_name(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    save_checkpoint(make_model("qwen2_moe"), tmp_path)
    assert next(iter(changes)) in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("family_name", "field", "value"),
    [
        ("dots3_note", "mlp_bias", True),
        ("dots3_note", "num_key_value_heads", 2),
        ("mistral_large4", "kv_source_layers", [0, 0]),
        ("mistral_large4", "no_rope_layers", [1]),
        ("mistral_large4", "norm_topk_prob", False),
    ],
)
def test_other_maths_of_a_language_model_is_refused_by_name(
    family_name: str, field: str, value: Any, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(make_model(family_name), tmp_path)
    config = read_config(checkpoint)
    config["text_config"][field] = value
    write_config(checkpoint, config)
    with pytest.raises(UserError, match=field):
        describe(open_checkpoint(checkpoint))


def test_two_names_of_one_field_may_not_contradict_each_other(tmp_path: Path) -> None:
    save_checkpoint(make_model("mixtral"), tmp_path)
    assert "num_experts = 6" in refusal(tmp_path, num_experts=6)


def test_an_unsupported_model_type_names_the_supported_ones(family: Path) -> None:
    for name in ("llama", "config", "keys", "", "../qwen3_moe", "ane_moe.model.spec"):
        said = refusal(family, model_type=name)
        assert repr(name) in said
        assert all(supported in said for supported in FAMILIES)
    assert "model_type" in refusal(family, remove=("model_type",))
    assert "model_type" in refusal(family, model_type=["qwen3_moe"])


def test_a_family_is_found_by_its_model_type() -> None:
    for name in FAMILIES:
        assert load_family(name).spec.__module__ == f"ane_moe.families.{name}"


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "fp8", "weight_block_size": [128, 128]}, {"bits": 4}]
)
def test_quantised_checkpoints_are_refused_with_what_is_supported(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    save_checkpoint(make_model("mixtral"), tmp_path)
    said = refusal(tmp_path, quantization_config=quantization)
    assert quantization.get("quant_method", "unknown") in said
    assert "BF16" in said
    assert "dequantise" in said
