"""Write a random checkpoint with a real model's geometry, for measuring conversions: nothing is
downloaded.

    python scripts/make_checkpoint.py --like qwen3-30b-a3b --layers 2 --out /tmp/qwen3-2-layers

Config, keys, shapes and dtype are the real model's, cut to `--layers`; weights are scaled so that
activations stay finite and routing is uneven. Memory stays bounded: every tensor is a run of one
block of random numbers, read from a place of its own. With `--spectrum trained` half the variance
of a matrix lies in a few directions whose singular values fall as a power law, as trained matrices
have it, and some experts are chosen far more often than others. gpt-oss's experts are in MXFP4, as
its repository has them: random codes, and exponents that give them the deviation of the others.
"""

import json
import math
import os
import random
import shutil
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer

from ane_moe.checkpoints.original_filter import LABELS
from ane_moe.families import load_family
from ane_moe.families.config import Config
from ane_moe.families.keys import find_tensors
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import EMBEDDING, HEAD

# Elements; a prime, so that no two rows or tensors of a power-of-two size are alike.
BLOCK = 8_388_593
# A trained matrix: this share of its variance lies in so many directions; the singular values of
# those fall with the square root of their rank.
LEADING_SHARE, LEADING = 0.5, 32
# Deviation of the logarithm of a router row's length: the long rows win most tokens.
ROUTER_SPREAD = 0.5
SPECTRA = ("flat", "trained")
# Of a family whose preset lacks what others have: that in names.
OF_OTHERS = {"deepseek_v2": "q_b_proj"}
# Of MXFP4: what an exponent of 0 is stored as, and the deviation of all its 16 numbers.
EXPONENT_BIAS, FP4_DEVIATION = 127, 2.93
DTYPES = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}

LLAMA = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "rope_scaling": None,
}

# The config.json of each model as its repository has it.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "qwen1.5-moe-a2.7b": {
        **LLAMA,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
    "olmoe-1b-7b": {
        **LLAMA,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    "mixtral-8x7b": {
        **LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "granite-3.1-1b-a400m": {
        **LLAMA,
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "vocab_size": 49155,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "attention_bias": False,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 6.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "granite-4.0-h-tiny": {
        **LLAMA,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "vocab_size": 100352,
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "attention_bias": False,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 6.0,
        "layer_types": ["attention" if n % 10 == 5 else "mamba" for n in range(40)],
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_chunk_size": 256,
        "position_embedding_type": "nope",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "pad_token_id": 100256,
    },
    "nemotron-3-nano-30b-a3b": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": 131072,
        "hidden_size": 2688,
        "num_hidden_layers": 52,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": False,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "expand": 2,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "intermediate_size": 1856,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 262144,
        "layer_norm_epsilon": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "nemotron-3-super-120b-a12b": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "num_hidden_layers": 88,
        "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
        "EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": False,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "expand": 2,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "intermediate_size": 2688,
        "moe_intermediate_size": 2688,
        "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "n_routed_experts": 512,
        "n_shared_experts": 1,
        "num_experts_per_tok": 22,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 5.0,
        "max_position_embeddings": 262144,
        "layer_norm_epsilon": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "jamba-v0.1": {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": 65536,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "zaya1-8b": {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "vocab_size": 262272,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "moe_intermediate_size": 2048,
        "num_experts": 16,
        "num_experts_per_tok": 1,
        "router_hidden_size": 256,
        "cca_time0": 2,
        "cca_time1": 2,
        "attention_bias": False,
        "lm_head_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "layer_types": ["hybrid"] * 40,
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
        "bos_token_id": 2,
        "eos_token_id": 106,
        "pad_token_id": 0,
    },
    "lfm2-8b-a1b": {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "conv_L_cache": 3,
        "conv_bias": False,
        "max_position_embeddings": 128000,
        "norm_eps": 1e-5,
        "layer_types": [
            "full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)
        ],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
    },
    "deepseek-v2-lite": {
        **LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "attention_bias": True,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "mxfp4"},
        "tie_word_embeddings": False,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
    },
    "qwen3.5-35b-a3b": {  # transformers' own defaults, which are this model's
        **LLAMA,
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "layer_types": ([*["linear_attention"] * 3, "full_attention"]) * 10,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": False,
        "eos_token_id": 248044,
    },
    "privacy-filter": {
        "architectures": ["OpenAIPrivacyFilterForTokenClassification"],
        "model_type": "openai_privacy_filter",
        "vocab_size": 200064,
        "hidden_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 640,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
        "tie_word_embeddings": False,
        "eos_token_id": 199999,
        "pad_token_id": 199999,
    },
}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: normal numbers around `mean` with deviation `std`, or `bytes` from the
    first to before the last."""

    key: str
    shape: tuple[int, ...]
    mean: float
    std: float
    router: bool = False
    bytes: tuple[int, int] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class _AnyKey(dict[str, tuple[int, ...]]):
    """Holds every key, of no shape, so that a family names each tensor by the first form it knows
    which has nothing `without` in it."""

    def __init__(self, without: str | None) -> None:
        super().__init__()
        self.without = without

    def __contains__(self, key: object) -> bool:
        return self.without is None or self.without not in str(key)


def planned_tensors(spec: ModelSpec) -> list[Tensor]:
    """The stored tensors of `spec`, each once, as the model's repository stores them."""
    any_key = _AnyKey(OF_OTHERS.get(spec.family))
    sources = find_tensors(spec, any_key, load_family(spec.family).KEYS)
    if spec.head.tied:
        del sources[HEAD]
    stored = {source.key: source for source in sources.values()}
    return [
        Tensor(
            source.key,
            source.stored_shape,
            *_distribution(str(source.name), source.shape, len(spec.layers)),
            "router" in str(source.name),
        )
        for source in stored.values()
    ]


def in_mxfp4(tensors: list[Tensor]) -> list[Tensor]:
    """With experts as 4-bit codes and exponents, `[E, R, C / 32, 16]` and `[E, R, C / 32]`."""
    return [one for tensor in tensors for one in _coded(tensor)]


def _coded(tensor: Tensor) -> list[Tensor]:
    if len(tensor.shape) != 3 or "experts" not in tensor.key:
        return [tensor]
    experts, columns, rows = tensor.shape
    exponent = EXPONENT_BIAS + round(math.log2(tensor.std / FP4_DEVIATION))
    scales = (experts, rows, columns // 32)
    return [
        Tensor(f"{tensor.key}_blocks", (*scales, 16), 0, 0, bytes=(0, 256)),
        Tensor(f"{tensor.key}_scales", scales, 0, 0, bytes=(exponent - 1, exponent + 2)),
    ]


def _distribution(name: str, shape: tuple[int, ...], layers: int) -> tuple[float, float]:
    """(mean, deviation): projections keep the variance of what they read, and the residual's stays
    near 1."""
    if name.endswith(("norm.weight", "scale", "temperature.weight", "skip.weight")):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith(("step.offset", "step.decay")):  # steps of 0.02, which leave e^-0.05
        return -4.0 if name.endswith("offset") else 1.0, 0.5
    if name == str(EMBEDDING):
        return 0.0, 0.02
    gain = (
        2.0
        if "router" in name
        else (2 * layers) ** -0.5
        if name.endswith(("o.weight", "down.weight"))
        else 1.0
    )
    # A convolution reads its channels and taps.
    return 0.0, gain * math.prod(shape[1:]) ** -0.5


def write_checkpoint(
    folder: Path, config: dict[str, Any], noise: "Noise", dtype: str, shard_bytes: int
) -> int:
    """Write config.json and random weights into `folder`; returns the bytes of the weights."""
    spec = load_family(config["model_type"]).spec(Config(config))
    tensors, item = planned_tensors(spec), DTYPES[dtype][1].itemsize
    if config.get("quantization_config", {}).get("quant_method") == "mxfp4":
        tensors = in_mxfp4(tensors)
    files = _split(tensors, shard_bytes // item)
    names = [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    for name, tensors in zip(names, files, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(_header(tensors, dtype))
            for tensor in tensors:
                noise.write(tensor, stream)
    total = sum(_stored(tensor, item) for tensors in files for tensor in tensors)
    weight_map = {
        tensor.key: name for name, tensors in zip(names, files, strict=True) for tensor in tensors
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=1))
    return total


def _split(tensors: list[Tensor], elements: int) -> list[list[Tensor]]:
    files: list[list[Tensor]] = [[]]
    room = elements
    for tensor in tensors:
        if files[-1] and tensor.elements > room:
            files.append([])
            room = elements
        files[-1].append(tensor)
        room -= tensor.elements
    return files


def _stored(tensor: Tensor, item: int) -> int:
    """Its bytes."""
    return tensor.elements * (1 if tensor.bytes else item)


def _header(tensors: list[Tensor], dtype: str) -> bytes:
    name, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _stored(tensor, kind.itemsize)
        stored = "U8" if tensor.bytes else name
        header[tensor.key] = {"dtype": stored, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Noise:
    """One block of normal numbers, of which every tensor is a run that starts at its own place."""

    def __init__(self, dtype: str, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.unit = torch.randn(BLOCK, generator=generator)
        self.places = random.Random(seed)
        self.dtype = DTYPES[dtype][1]
        self.block = lru_cache(maxsize=8)(self._scaled)
        self.codes = lru_cache(maxsize=8)(self._codes)

    def write(self, tensor: Tensor, stream: BinaryIO) -> None:
        """Append the bytes of `tensor`."""
        if tensor.bytes:
            block, item = self.codes(*tensor.bytes), 1
        else:
            block, item = self.block(tensor.mean, tensor.std), self.dtype.itemsize
        place, left = self.places.randrange(BLOCK), tensor.elements
        while left:
            run = min(left, BLOCK - place)
            stream.write(block[place * item : (place + run) * item])
            place, left = 0, left - run

    def _scaled(self, mean: float, std: float) -> memoryview:
        return (self.unit * std + mean).to(self.dtype).view(torch.uint8).numpy().data

    def _codes(self, first: int, end: int) -> memoryview:
        """Bytes by the place of a normal number in its distribution, all equally often."""
        share = 0.5 + 0.5 * torch.erf(self.unit * 0.5**0.5)
        return (first + share * (end - first)).clamp(first, end - 1).byte().numpy().data


class TrainedNoise(Noise):
    """As `Noise`, but matrices have leading directions and routers have long and short rows."""

    def write(self, tensor: Tensor, stream: BinaryIO) -> None:
        """Append the bytes of `tensor`, some rows at a time."""
        if tensor.bytes or len(tensor.shape) < 2 or tensor.mean or tensor.shape[-1] <= LEADING:
            return super().write(tensor, stream)
        columns = tensor.shape[-1]
        rows = tensor.elements // columns
        falling = torch.arange(1, LEADING + 1) ** -0.5
        falling = falling * (LEADING_SHARE / falling.square().sum()) ** 0.5
        right = falling[:, None] * self._run(LEADING, columns)  # (LEADING, columns)
        step = max(1, BLOCK // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            values = self._run(count, columns).mul((1 - LEADING_SHARE) ** 0.5)
            values.addmm_(self._run(count, LEADING), right)
            if tensor.router:
                values *= (self._run(count, 1) * ROUTER_SPREAD).exp()
            values = values.mul_(tensor.std).to(self.dtype)
            stream.write(values.view(torch.uint8).numpy().data)

    def _run(self, rows: int, columns: int) -> torch.Tensor:
        """Normal numbers from a place of their own, (rows, columns)."""
        wanted, place = rows * columns, self.places.randrange(BLOCK)
        start, rest = self.unit[place : place + wanted], wanted - (BLOCK - place)
        run = torch.cat([start, self.unit[:rest]]) if rest > 0 else start.clone()
        return run.reshape(rows, columns)


def main(
    like: Annotated[
        str, typer.Option(help=f"The model whose geometry to copy: {', '.join(PRESETS)}.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    layers: Annotated[
        int | None, typer.Option(help="How many layers to keep; all by default.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    spectrum: Annotated[str, typer.Option(help=f"One of {', '.join(SPECTRA)}.")] = "flat",
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    shard_mb: Annotated[int, typer.Option(help="Largest weight file, in MB.", min=1)] = 1000,
) -> None:
    """Write a random checkpoint with a real model's geometry."""
    for option, value, known in (
        ("--like", like, PRESETS),
        ("--dtype", dtype, DTYPES),
        ("--spectrum", spectrum, SPECTRA),
    ):
        if value not in known:
            raise typer.BadParameter(
                f"{value!r} is not one of {', '.join(known)}", param_hint=option
            )
    if out.exists():
        raise typer.BadParameter(f"{out} exists", param_hint="--out")
    config = PRESETS[like]
    count = layers or config["num_hidden_layers"]
    by_layer = ("layer_types", "hybrid_override_pattern")
    kinds = {field: config[field][:count] for field in by_layer if field in config}
    config = {**config, "num_hidden_layers": count, **kinds}
    unfinished = out.with_name(f".{out.name}.tmp")
    unfinished.mkdir(parents=True)
    try:
        noise = (TrainedNoise if spectrum == "trained" else Noise)(dtype, seed)
        total = write_checkpoint(unfinished, config, noise, dtype, shard_mb * 1_000_000)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(
        f"{out}: {like}, {config['num_hidden_layers']} layers, {total / 1e9:.2f} GB of {dtype} "
        f"weights"
    )


if __name__ == "__main__":
    typer.run(main)
