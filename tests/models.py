"""Tiny random Hugging Face models of every family, saved as real checkpoints: what the tests
convert.

Sizes are odd on purpose, and everything that a fresh model leaves neutral is randomised, so that no
part can be wrong unseen: norm weights are not 1, biases not 0, routing is not uniform.
"""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ane_moe.original import afm as afm  # register themselves with transformers
from ane_moe.original import mm1_moe as mm1_moe
from ane_moe.original import omni_moe as omni_moe
from ane_moe.original import pt_moe as pt_moe
from tests.zoo import COMMON as ZOO
from tests.zoo import ROWS, SIZES, WITH_IMAGES, YARN

LLAMA_SHAPED = ("granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
DECODERS = ("granitemoe", "lfm2_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "zaya")
FAMILIES = (*DECODERS, "openai_privacy_filter")
RESEARCH = ("afm", "mm1_moe", "omni_moe", "pt_moe")  # which transformers does not have
CLASSES: dict[str, Any] = {
    "openai_privacy_filter": AutoModelForTokenClassification,
    **dict.fromkeys((*WITH_IMAGES, "qwen3_omni_moe"), AutoModelForImageTextToText),
}

# Seeds of models that are decided on the tests' prompts, where the first one is not.
DECIDED = {"lfm2_moe": 1}

COMMON = {**SIZES, "num_hidden_layers": 3}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **COMMON,
        "intermediate_size": 100,
        "moe_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],  # a dense layer between two sparse ones
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "granitemoe": {
        **COMMON,
        "intermediate_size": 24,
        "num_local_experts": 9,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,  # not 16 ** -0.5
        "logits_scaling": 6.0,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    },
    "mixtral": {
        **COMMON,
        "intermediate_size": 56,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "olmoe": {
        **COMMON,
        "num_attention_heads": 6,  # its q norm spans d_model, so heads x head_dim has to equal it
        "num_key_value_heads": 3,
        "head_dim": 12,
        "intermediate_size": 32,
        "num_experts": 10,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "clip_qkv": 1.5,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        **COMMON,
        "num_key_value_heads": 4,
        "intermediate_size": 88,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 52,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "zaya": {
        **COMMON,
        "moe_intermediate_size": 40,
        "num_experts": 5,  # and one class that skips them
        "num_experts_per_tok": 1,
        "router_hidden_size": 24,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "sliding_window": 17,
        "rope_parameters": {
            "hybrid": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "partial_rotary_factor": 0.5,
            },
            "hybrid_sliding": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {
        **{name: value for name, value in COMMON.items() if name != "head_dim"},
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "intermediate_size": 100,
        "moe_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_eps": 1e-5,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "openai_privacy_filter": {
        **COMMON,
        "num_attention_heads": 6,
        "intermediate_size": 40,
        "num_local_experts": 9,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 0.7,  # so that both clamps cut something
        "swiglu_alpha": 1.3,
        "rope_parameters": YARN,
        "id2label": {number: f"label-{number}" for number in range(7)},
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "pt_moe": {
        **SIZES,
        "num_hidden_layers": 6,  # of each track: a block of four, and half a block
        "num_tracks": 2,
        "track_depth": 4,
        "track_reduce": "mean",
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "sliding_window": 5,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}

CONFIGS |= {
    family: row.config if "text_config" in row.config else {**ZOO, **row.config}
    for family, row in ROWS.items()
}
del CONFIGS["longcat_flash"]["num_hidden_layers"]  # which follows from another field

# Other settings under which a family's maths or layout differs: name -> (family, what differs).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen3_moe with biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe sparse every other layer": (
        "qwen3_moe",
        {"mlp_only_layers": [], "decoder_sparse_step": 2},
    ),
    "qwen3_moe not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe with windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 17}),
    "qwen3_moe with yarn": (
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
    "mixtral tied with windows": ("mixtral", {"tie_word_embeddings": True, "sliding_window": 17}),
    "olmoe without clipping": ("olmoe", {"clip_qkv": None, "attention_bias": True}),
    "olmoe tied and renormalised": ("olmoe", {"tie_word_embeddings": True, "norm_topk_prob": True}),
    "granitemoe untied": ("granitemoe", {"tie_word_embeddings": False, "attention_bias": False}),
    "qwen2_moe untied without biases": (
        "qwen2_moe",
        {"tie_word_embeddings": False, "qkv_bias": False},
    ),
    "qwen2_moe with windows": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "max_window_layers": 2,
            "mlp_only_layers": [0],
        },
    ),
}


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random fp32 model of `family`, in eager mode; `overrides` are config fields."""
    torch.manual_seed(seed)
    fields = deepcopy({**CONFIGS[family], **overrides})  # transformers edits what it is given
    if "layer_types" in CONFIGS[family]:
        fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    config = AutoConfig.for_model(family, **fields)
    if family == "qwen3_omni_moe":
        config = config.thinker_config
    model = CLASSES.get(family, AutoModelForCausalLM).from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"norm(_\w)?\.weight$|[_.]scale$|\.temp$|\.D$", name):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif (
                "conv" in name and parameter.dim() == 3
            ):  # else it hardly counts beside what goes past it
                parameter.normal_().div_(parameter[0].numel() ** 0.5)
            elif "gate.router_mlp" in name and parameter.dim() == 2:  # and routing hardly decided
                parameter.normal_().mul_(3 * parameter.shape[1] ** -0.5)
            elif name.endswith(("A_log", "dt_bias")):  # slow decays and fast ones
                parameter.uniform_(-4, 1.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif name.endswith("sinks"):
                parameter.normal_()
            elif not parameter.any():  # AFMoE's router begins with zeros
                parameter.normal_().mul_(0.08)
            else:
                parameter.mul_(
                    4
                )  # the usual init, 0.02, leaves so narrow a model's routing near uniform
        for name, buffer in model.named_buffers():
            if name.endswith(("balancing_biases", "expert_bias", "correction_bias")):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("rotary_emb.alpha"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            elif name.endswith(("quant_key_scale", "quant_value_scale")):  # so that some is cut off
                buffer.copy_(0.01 + 0.01 * torch.rand_like(buffer))
    return model.eval()


def make_variant(variant: str, seed: int = 0) -> PreTrainedModel:
    """The model of one entry of VARIANTS."""
    family, overrides = VARIANTS[variant]
    return make_model(family, seed, **overrides)


def save_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """Save `model` as users have it: experts as the family's own repositories store them."""
    if model.config.model_type == "qwen3_omni_moe_thinker":
        return _save_thinker(model, folder)
    model.save_pretrained(folder)
    if model.config.model_type == "kimi_k25":
        _rename(folder, ".model.blocks.", ".model.layers.")
    if model.config.model_type == "longcat_flash":
        _drop_idle_experts(folder, model.config.n_routed_experts)
    return folder


def _save_thinker(model: PreTrainedModel, folder: Path) -> Path:
    """As a part of the model that also hears and speaks."""
    config = AutoConfig.for_model("qwen3_omni_moe", enable_audio_output=False)
    config.thinker_config = model.config
    whole = AutoModelForMultimodalLM.from_config(config)
    whole.thinker = model
    whole.save_pretrained(folder)
    return folder


def _drop_idle_experts(folder: Path, experts: int) -> None:
    """transformers makes matrices for experts that compute nothing, which no published file has."""
    file = folder / "model.safetensors"
    numbers = {key: re.search(r"\.experts\.(\d+)\.", key) for key in load_file(file)}
    computing = {key for key, found in numbers.items() if not found or int(found[1]) < experts}
    tensors = {key: tensor for key, tensor in load_file(file).items() if key in computing}
    save_file(tensors, file, {"format": "pt"})


def _rename(folder: Path, wrong: str, right: str) -> None:
    """Undo what transformers' reversed renaming, which is meant for a tower, does to the rest."""
    file = folder / "model.safetensors"
    tensors = {key.replace(wrong, right): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def save_fused(model: PreTrainedModel, folder: Path) -> Path:
    """Save `model` with transformers 5's own names, experts stacked."""
    save_checkpoint(model, folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_old_config_names(folder: Path) -> Path:
    """Rewrite config.json with the names that files of transformers 4 have."""
    config = read_config(folder)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = (
        None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    )
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"].startswith("qwen"):
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    write_config(folder, config)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    """Change some fields of config.json and take others out."""
    config = read_config(folder)
    write_config(
        folder, {key: value for key, value in (config | changes).items() if key not in remove}
    )
    return folder
