"""Writes models as GGUF with the `gguf` package, named by its tensor map, and laid out as llama.cpp's
converter does (`conversion/*.py`)."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from tests.models import make_model, save_checkpoint

ONE_GROUP = {"n_group": 1, "topk_group": 1}
# What a GGUF cannot hold, or blocks of 32 do not fit, of tests/models.py.
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [], "hidden_size": 96, "moe_intermediate_size": 64},
    "qwen2_moe": {"hidden_size": 96, "moe_intermediate_size": 32},
    "olmoe": {"hidden_size": 96, "head_dim": 16, "clip_qkv": None},
    "mixtral": {"hidden_size": 96, "intermediate_size": 64},
    "granitemoe": {"hidden_size": 96, "head_dim": 24, "intermediate_size": 32},
    "gpt_oss": {
        "hidden_size": 96,
        "intermediate_size": 64,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    "lfm2_moe": {"hidden_size": 96, "routed_scaling_factor": 1.0},
    "glm4_moe": {"hidden_size": 96, "moe_intermediate_size": 64, "num_nextn_predict_layers": 1}
    | ONE_GROUP,
    "dots1": {"hidden_size": 96, "moe_intermediate_size": 64, "sliding_window": None} | ONE_GROUP,
    "minimax_m2": {"hidden_size": 96, "intermediate_size": 64},
}
ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
}
SIGMOID = ("lfm2_moe", "glm4_moe", "dots1", "minimax_m2")
PERMUTED = ("mixtral", "granitemoe")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


def make(family: str, **overrides: Any) -> PreTrainedModel:
    return make_model(family, **{**OVERRIDES[family], **overrides})


def save_both(
    model: PreTrainedModel,
    folder: Path,
    kind: Kind,
    parts: int = 1,
    fused: bool = False,
    **facts: Any,
) -> tuple[Path, Path]:
    """A GGUF model, and the safetensors checkpoint of the numbers that it holds. `fused`: gate and
    up of experts in one stack; `facts` are given to the writer's methods of these names."""
    plain = save_checkpoint(model, folder / "plain")
    config = json.loads((plain / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(plain.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (plain / "model.safetensors.index.json").unlink(missing_ok=True)
    stored = {name: _stored(name, _turned(name, each), kind) for name, each in tensors.items()}
    numbers = {
        name: _turned(name, torch.from_numpy(gguf.quants.dequantize(data, own).astype(np.float32)))
        for name, (data, own) in stored.items()
    }
    shaped = {
        name: number.reshape(tensors[name].shape).contiguous() for name, number in numbers.items()
    }
    save_file(shaped, plain / "model.safetensors", {"format": "pt"})
    return write(folder / "model.gguf", config, stored, parts, fused, facts), plain


def _turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """gpt-oss' experts the other way round."""
    return tensor.mT.contiguous() if re.search(r"experts\.(gate_up|down)_proj$", name) else tensor


def _stored(name: str, tensor: torch.Tensor, kind: Kind) -> tuple[np.ndarray, Kind]:
    """As llama.cpp chooses: vectors, routers and short convolutions stay fp32, rows that are no
    whole blocks fp16."""
    whole = (
        tensor.squeeze().ndim < 2
        or "bias" in name
        or "conv.conv" in name
        or re.search(r"gate\.weight|router", name)
    )
    if whole:
        return tensor.float().numpy(), Kind.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    own = Kind.F16 if tensor.shape[-1] % block else kind
    return gguf.quants.quantize(tensor.float().numpy(), own), own


def write(
    file: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, tuple[np.ndarray, Kind]],
    parts: int,
    fused: bool,
    facts: Mapping[str, Any],
) -> Path:
    family = config["model_type"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config["num_hidden_layers"])
    count = sum(1 for _ in _laid_out(config, stored, fused))
    writer = gguf.GGUFWriter(
        file,
        gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]],
        split_max_tensors=-(-count // parts) if parts > 1 else 0,
    )
    _metadata(writer, config)
    for key, value in facts.items():
        getattr(writer, key)(value)
    for name, (data, kind) in _laid_out(config, stored, fused):
        stem, _, end = name.rpartition(".")
        if name.startswith("blk."):
            writer.add_tensor(name, data, raw_dtype=kind)
            continue
        own = names.get_name(stem) or names.get_name(stem.removeprefix("model."))
        assert own, name
        writer.add_tensor(f"{own}.{end}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if parts == 1 else file.with_name(f"{file.stem}-00001-of-{parts:05}.gguf")


def _laid_out(
    config: Mapping[str, Any], stored: Mapping[str, tuple[np.ndarray, Kind]], fused: bool
) -> Iterator[tuple[str, tuple[np.ndarray, Kind]]]:
    stacks: dict[str, list[np.ndarray]] = {}
    for name in sorted(stored, key=dot_natural_key):
        data, kind = stored[name]
        if found := EXPERT.fullmatch(name):
            base, number, matrix = found.groups()
            stack = stacks.setdefault(f"{base}.{matrix}.weight", [])
            assert len(stack) == int(number)
            stack.append(data)
            experts = _experts(config)
            if len(stack) == experts:
                yield f"{base}.{matrix}.weight", (np.stack(stack), kind)
        elif name.endswith("input_linear.weight") and fused:
            yield f"blk.{name.split('.')[2]}.ffn_gate_up_exps.weight", (data, kind)
        elif name.endswith("input_linear.weight"):
            base, half = name.removesuffix("input_linear.weight"), data.shape[1] // 2
            for matrix, part in (("w1", data[:, :half]), ("w3", data[:, half:])):
                yield f"{base}experts.{matrix}.weight", (np.ascontiguousarray(part), kind)
        elif name.endswith("output_linear.weight"):
            yield name.replace("output_linear", "experts.w2"), (data, kind)
        elif found := re.fullmatch(r"(.+experts)\.gate_up_proj(_bias)?", name):
            end = "bias" if found[2] else "weight"
            for number, matrix in enumerate(("gate_proj", "up_proj")):
                yield f"{found[1]}.{matrix}.{end}", (np.ascontiguousarray(data[:, number::2]), kind)
        elif found := re.fullmatch(r"(.+experts\.down_proj)(_bias)?", name):
            yield f"{found[1]}.{'bias' if found[2] else 'weight'}", (data, kind)
        elif name.endswith("sinks"):
            yield f"{name}.weight", (data, kind)
        elif name.endswith("shared_expert_gate.weight"):
            yield name, (data.reshape(-1), kind)
        elif name.endswith("expert_bias"):
            yield f"{name}.bias", (data, kind)
        elif name.endswith("e_score_correction_bias"):
            yield f"blk.{name.split('.')[2]}.exp_probs_b.bias", (data, kind)
        elif "conv.conv" in name:
            yield name, (data[:, 0], kind)
        else:
            permuted = config["model_type"] in PERMUTED and re.search(r"\.[qk]_proj\.", name)
            yield name, (_permuted(config, name, data) if permuted else data, kind)


def _experts(config: Mapping[str, Any]) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(config[name] for name in names if config.get(name))


def _permuted(config: Mapping[str, Any], name: str, data: np.ndarray) -> np.ndarray:
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    split = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return split.swapaxes(1, 2).reshape(data.shape)


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    family = config["model_type"]
    further = config.get("num_nextn_predict_layers") or 0
    writer.add_block_count(config["num_hidden_layers"] + further)
    if further:
        writer.add_nextn_predict_layers(further)
        name = f"blk.{config['num_hidden_layers']}.nextn.eh_proj.weight"  # which is left out
        writer.add_tensor(name, np.zeros((2, 4), np.float32))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    heads = config["num_key_value_heads"]
    kinds = config["layer_types"] if family == "lfm2_moe" else None
    writer.add_head_count_kv([heads * (k != "conv") for k in kinds] if kinds else heads)
    if config.get("head_dim") and family != "granitemoe":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    writer.add_expert_count(_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if family == "mixtral" and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    if family == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if family in SIGMOID:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if "partial_rotary_factor" in rope and family in SIGMOID:
        writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    if family == "minimax_m2":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if family in ("glm4_moe", "dots1"):
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if family == "lfm2_moe":
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_file_type(1)
