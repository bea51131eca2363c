"""Families of known parts: one row each, a tiny model's configuration and other settings under
which the maths or the layout differs."""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]
WITH_IMAGES = (  # or counted among those that have by transformers
    "aria",
    "deepseek_ocr2",
    "dots3_note",
    "ernie4_5_vl_moe",
    "gemma4",
    "glm4v_moe",
    "kimi_k25",
    "llama4",
    "minimax_m3_vl",
    "mistral3",
    "mistral4",
    "mistral_large4",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "step3p7",
    "unlimited_ocr",
)

SIZES: Fields = {
    "vocab_size": 211,
    "hidden_size": 72,  # not a multiple of 32
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # 4 x 16 is not 72
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
COMMON: Fields = {
    **SIZES,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
FULL, SLIDING = "full_attention", "sliding_attention"
YARN: Fields = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
DEEPSEEK: Fields = {
    "intermediate_size": 100,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}
BY_KIND: Fields = {
    FULL: {"rope_type": "default", "rope_theta": 500000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
}
LATENT: Fields = {
    **DEEPSEEK,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "kv_lora_rank": 24,
    "q_lora_rank": 28,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "attention_bias": True,
}
LATENT_SIZES = (
    *("head_dim", "num_key_value_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("kv_lora_rank", "q_lora_rank", "attention_bias"),
)
MSCALE: Fields = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}
MISTRAL: Fields = {
    **LATENT,
    "head_dim": 20,
    "rope_interleave": True,
    "rope_parameters": MSCALE
    | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 160},
}
INDEXED: Fields = {
    **LATENT,
    "index_topk": 160,
    "index_head_dim": 16,
    "index_n_heads": 3,
}
LARGE: Fields = {
    **COMMON,
    **{
        name: size
        for name, size in LATENT.items()
        if name not in ("q_lora_rank", "first_k_dense_replace")
    },
    "mlp_layer_types": ["dense", "sparse"],
    "no_rope_layers": [1, 0],
    "indexer_types": ["full", "full"],
    "index_topk": 160,
    "index_head_dim": 16,
    "index_n_heads": 3,
    "final_logit_softcapping": 3.0,
    "rope_parameters": MSCALE | {"attention_factor": 1.0},
}
INDEX = "indexed_attention"
NOTE: Fields = {
    **COMMON,
    **{name: size for name, size in LATENT.items() if name != "first_k_dense_replace"},
    "head_dim": 20,
    "shared_experts_intermediate_size": 52,
    "layer_types": [INDEX, SLIDING],
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 5,
    "index_topk": 160,
    "index_head_dim": 16,
    "index_n_heads": 8,
    "rope_parameters": {INDEX: BY_KIND[FULL], SLIDING: BY_KIND[SLIDING]},
    "per_layer_config": {
        1: {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "head_dim": 28,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 12,
            "v_head_dim": 24,
        }
    },
}
BLOCKS: Fields = {
    **COMMON,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "dense_intermediate_size": 100,
    "shared_intermediate_size": 52,
    "num_local_experts": 12,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
    "swiglu_limit": 0.7,  # so that both clamps cut something
    "swiglu_alpha": 1.3,
    "rotary_dim": 8,
    "rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": 0.5},
    "layer_types": [FULL, "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 20,
}
OCR: Fields = {
    **COMMON,
    "hidden_size": 64,  # as wide as its heads
    "intermediate_size": 100,
    "moe_intermediate_size": 40,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "mlp_layer_types": ["dense", "sparse"],
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "attention_bias": True,
}
PROMPT_WINDOWS: Fields = {
    **OCR,
    "num_key_value_heads": 4,  # transformers' own eager attention repeats no heads here
    "layer_types": ["reference_sliding_attention", FULL],
    "sliding_window": 2,  # fewer than are generated
}
SAM: Fields = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 16,
    "downsample_channels": [8, 16],
}
GRANITE: Fields = {
    "intermediate_size": 24,
    "num_local_experts": 9,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,  # not 16 ** -0.5
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
    "shared_intermediate_size": 52,
}
GEMMA: Fields = {
    "intermediate_size": 100,
    "moe_intermediate_size": 40,
    "num_experts": 12,
    "top_k_experts": 3,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "attention_bias": True,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "layer_types": [SLIDING, FULL],
    "sliding_window": 5,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
    "rope_parameters": {
        FULL: {
            "rope_type": "proportional",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.5,
        },
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
}
CHUNKED = "chunked_attention"
LLAMA: Fields = {
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "intermediate_size_mlp": 100,
    "num_local_experts": 9,
    "num_experts_per_tok": 1,
    "moe_layers": [0, 2],
    "layer_types": [CHUNKED, CHUNKED, FULL],
    "no_rope_layers": [1, 1, 0],
    "attention_chunk_size": 5,
    "attention_bias": True,
    "floor_scale": 3,
    "attn_scale": 0.4,
}
LINEAR = "linear_attention"
DELTA: Fields = {
    "layer_types": [LINEAR, FULL],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,  # the last axis of a state
    "linear_value_head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 52,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
KDA: Fields = {
    **LATENT,
    "layer_types": [LINEAR, FULL],
    "mlp_layer_types": ["sparse", "dense"],
    "num_local_experts": 12,
    "attention_bias": False,
    "pad_token_id": 0,  # an embedding has to have it
}
DELTA_VISION: Fields = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 72,
    "num_position_embeddings": 16,
}
THINKER: Fields = {
    "vision_start_token_id": 151652,
    "text_config": {
        **COMMON,
        "intermediate_size": 100,
        "moe_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "audio_config": {
        "num_mel_bins": 8,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "output_dim": 72,
        "downsample_hidden_size": 8,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 72,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}
ERNIE_TEXT: Fields = {
    **COMMON,
    "intermediate_size": 100,
    "moe_intermediate_size": [40, 24],
    "moe_num_experts": 12,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "moe_norm_min": 0.4,  # more than many a sum
    "mlp_layer_types": ["dense", "sparse"],
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [3, 3, 2],
    },
}


@dataclass(frozen=True)
class Row:
    """`config`: what differs from COMMON; `variants`: by name, what differs from that. `seed`: of
    a model whose routing is decided on the tests' prompts; near ties may fall otherwise in fp16."""

    config: Fields
    variants: dict[str, Fields] = field(default_factory=dict)
    seed: int = 0
    fused: bool = True  # transformers 5's own names are another form of its checkpoint


VISION = {  # of a tower that is left out
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROWS: dict[str, Row] = {
    "afm": Row(
        {
            "num_hidden_layers": 8,
            "num_kv_reuse_layers": 3,
            "intermediate_size": 100,
            "tie_word_embeddings": True,
        },
        {"with caches of its own in each layer": {"num_kv_reuse_layers": 0}},
        fused=False,
    ),
    "gpt_oss": Row(
        {
            "intermediate_size": 40,
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL],
            "swiglu_limit": 0.7,  # so that both clamps cut something
            "swiglu_alpha": 1.3,
            "rope_parameters": YARN,
        },
        {"without attention biases": {"attention_bias": False}},
    ),
    "glm4_moe": Row(
        {
            **DEEPSEEK,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_nextn_predict_layers": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "plain": {"use_qk_norm": False, "attention_bias": False, "norm_topk_prob": False},
            "one group": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        },
    ),
    "ernie4_5_moe": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "moe_num_experts": 12,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "moe_norm_min": 0.4,  # more than many a sum
            "tie_word_embeddings": True,
        },
        {
            "usual": {
                "moe_norm_min": 1e-12,
                "moe_num_shared_experts": 0,
                "moe_layer_interval": 2,
                "moe_layer_start_index": 0,
            }
        },
    ),
    "mellum": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["sparse", "dense"],
            "sliding_window": 5,
            "rope_parameters": BY_KIND,
        },
        {
            "with yarn": {
                "attention_bias": False,
                "norm_topk_prob": False,
                "rope_parameters": BY_KIND | {FULL: YARN},
            }
        },
    ),
    "granitemoeshared": Row(
        GRANITE, {"without": {"shared_intermediate_size": 0, "tie_word_embeddings": False}}
    ),
    "granitemoe_swa": Row(
        {
            **GRANITE,
            "sliding_window": 5,
            "layer_types": [FULL, SLIDING],
            "layer_rope_theta": [0, 500000.0],
        },
        {"one base": {"layer_rope_theta": None, "shared_intermediate_size": 0}},
    ),
    "dots1": Row(
        {
            **DEEPSEEK,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        {"without windows": {"sliding_window": None, "attention_bias": False}},
    ),
    "minimax_m2": Row(
        {
            "intermediate_size": 40,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "minimax_m3_vl": Row(
        {
            "text_config": BLOCKS,
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "projector_hidden_size": 16,
        },
        {"no blocks": {"text_config": BLOCKS | {"layer_types": [FULL] * 3}}},
    ),
    "solar_open": Row(
        {**DEEPSEEK, "n_routed_experts": 12, "n_shared_experts": 1, "attention_bias": True},
        {"with yarn": {"attention_bias": False, "rope_parameters": YARN}},
    ),
    "exaone_moe": Row(
        {
            **DEEPSEEK,
            "num_experts": 12,
            "num_shared_experts": 2,
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["dense", "sparse"],
            "sliding_window": 5,
        },
        {"full": {"layer_types": [FULL] * 2, "mlp_layer_types": ["sparse"] * 2}},
    ),
    "flex_olmo": Row(
        {
            "num_attention_heads": 6,  # its q norm spans d_model
            "num_key_value_heads": 3,
            "head_dim": 12,
            "intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
        {"renormalised": {"norm_topk_prob": True, "attention_bias": False}},
    ),
    "afmoe": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "num_dense_layers": 1,
            "layer_types": [SLIDING, FULL],
            "sliding_window": 5,
            "route_scale": 1.7,
            "mup_enabled": True,
        },
        {"all sparse": {"num_dense_layers": 0, "mup_enabled": False, "num_shared_experts": 1}},
    ),
    "beam": Row(
        {
            **DEEPSEEK,
            "num_experts": 12,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 5,
            "attention_bias": True,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {SLIDING: BY_KIND[SLIDING], FULL: None},
        },
        {
            "all rotated": {
                "attention_bias": False,
                "layer_types": [FULL, SLIDING, FULL],
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "final_logit_softcapping": None,
                "rope_parameters": BY_KIND,
            }
        },
    ),
    "jetmoe": Row(
        {
            "intermediate_size": 40,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-2,  # of the last norm alone
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
        },
        {"three chosen": {"num_experts_per_tok": 3, "tie_word_embeddings": False}},
        fused=False,
    ),
    "longcat_flash": Row(
        {
            "num_layers": 2,
            **{name: size for name, size in LATENT.items() if name in LATENT_SIZES},
            "ffn_hidden_size": 100,
            "expert_ffn_hidden_size": 40,
            "n_routed_experts": 12,
            "zero_expert_num": 5,
            "moe_topk": 4,
            "routed_scaling_factor": 1.7,
            "rope_parameters": MSCALE,
        },
        {"no idle experts": {"zero_expert_num": 0, "num_layers": 1, "attention_bias": False}},
        fused=False,
    ),
    "deepseek_v2": Row(
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "rope_parameters": MSCALE,
        },
        {
            "lite": {
                "q_lora_rank": None,
                "topk_method": "greedy",
                "n_group": None,
                "topk_group": None,
                "attention_bias": False,
            }
        },
    ),
    "deepseek_v3": Row(
        LATENT,
        {
            "half-split": {
                "rope_interleave": False,
                "q_lora_rank": None,
                "rope_parameters": MSCALE,
            },
            "one group": {"n_group": 1, "topk_group": 1, "attention_bias": False},
        },
    ),
    "glm4_moe_lite": Row(
        {**LATENT, "rope_interleave": True, "mlp_layer_types": ["dense", "sparse"]},
        {"one group": {"n_group": 1, "topk_group": 1, "q_lora_rank": None}},
    ),
    "aria": Row(
        {
            "text_config": {
                **COMMON,
                "intermediate_size": 40,
                "moe_num_experts": 12,
                "moe_topk": 3,
                "moe_num_shared_experts": 2,
                "attention_bias": True,
            },
            "vision_config": {
                **VISION,
            },
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "qwen3_vl_moe": Row(
        {
            "text_config": {
                **COMMON,
                "intermediate_size": 100,
                "moe_intermediate_size": 40,
                "num_experts": 12,
                "num_experts_per_tok": 3,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [0],
                "attention_bias": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 72,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "glm4v_moe": Row(
        {
            "text_config": {
                **COMMON,
                **DEEPSEEK,
                "n_routed_experts": 12,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
                "attention_bias": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 72,
                "image_size": 28,
            },
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "laguna": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 52,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["dense", "sparse"],
            "num_attention_heads_per_layer": [6, 4],
            "sliding_window": 5,
            "moe_routed_scaling_factor": 1.7,
            "moe_router_logit_softcapping": 1.5,
            "gating": True,
            "attention_bias": True,
            "rope_parameters": {
                FULL: BY_KIND[FULL] | {"partial_rotary_factor": 0.5},
                SLIDING: BY_KIND[SLIDING],
            },
        },
        {
            "gates by channel": {
                "gating": "per-element",
                "attention_bias": False,
                "moe_router_logit_softcapping": 0.0,
                "mlp_layer_types": ["sparse", "sparse"],
            }
        },
    ),
    "flint": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 52,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
            "layer_types": [SLIDING, FULL],
            "sliding_window": 5,
            "attention_bias": True,
        },
        {
            "plain": {
                "attention_bias": False,
                "norm_topk_prob": False,
                "mlp_only_layers": [],
            }
        },
    ),
    "phimoe": Row(
        {
            "intermediate_size": 40,
            "num_local_experts": 12,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.2,  # so that others come near
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 5,
        },
        {
            "longrope": {
                "attention_bias": False,
                "lm_head_bias": False,
                "sliding_window": None,
                "router_jitter_noise": 0.01,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
                    "long_factor": [2.0] * 8,
                    "short_mscale": 1.2,
                    "long_mscale": 1.4,
                    "original_max_position_embeddings": 64,
                },
            }
        },
        seed=1,
    ),
    "hunyuan_v1_moe": Row(
        {
            "intermediate_size": 40,
            "num_experts": 9,
            "moe_topk": 3,
            "attention_bias": True,
        },
        {
            "by layer": {"moe_topk": [3, 3], "attention_bias": False},
            "scaled": {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "alpha": 1000.0,
                    "factor": 1.0,
                }
            },
        },
    ),
    "qwen3_next": Row(
        {
            **DELTA,
            "intermediate_size": 100,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        {
            "other sizes": {
                "layer_types": [FULL, LINEAR],
                "linear_conv_kernel_dim": 2,
                "linear_num_key_heads": 3,
                "linear_num_value_heads": 3,
                "mlp_only_layers": [0],
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
            }
        },
    ),
    "gemma4_text": Row(
        GEMMA,
        {
            "plain": {
                "attention_k_eq_v": False,
                "attention_bias": False,
                "final_logit_softcapping": None,
                "tie_word_embeddings": True,
            }
        },
        fused=False,
    ),
    "gemma4": Row(
        {
            "text_config": {**COMMON, **GEMMA},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "dbrx": Row(
        {
            "d_model": 72,
            "num_attention_heads": 6,  # 6 x 12 is 72, as it has to be
            "head_dim": 12,
            "attn_config": {"kv_n_heads": 3, "clip_qkv": 0.7, "rope_theta": 500.0},
            "ffn_config": {
                "ffn_hidden_size": 40,
                "moe_num_experts": 9,
                "moe_top_k": 3,
                "moe_normalize_expert_weights": 1.0,
            },
        },
        {
            "plain": {
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500.0},
                "ffn_config": {
                    "ffn_hidden_size": 24,
                    "moe_num_experts": 5,
                    "moe_top_k": 2,
                    "moe_normalize_expert_weights": None,
                },
            }
        },
        fused=False,
    ),
    "step3p7": Row(
        {
            "text_config": {
                **COMMON,
                "num_hidden_layers": 3,
                "intermediate_size": 100,
                "moe_intermediate_size": 40,
                "share_expert_dim": 52,
                "n_routed_experts": 12,
                "num_experts_per_tok": 3,
                "num_sliding_attention_heads": 6,
                "sliding_window": 5,
                "layer_types": [SLIDING, FULL, FULL],
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "moe_router_scaling_factor": 1.7,
                "swiglu_limits": [0.0, 0.2, 0.0],
                "swiglu_limits_shared": [0.3, 0.4, 0.0],
                "query_pre_attn_scalar": 20,
                "pad_token_id": 0,
                "rope_parameters": BY_KIND | {FULL: BY_KIND[FULL] | {"partial_rotary_factor": 0.5}},
            },
            "vision_config": {
                **VISION,
            },
        },
        fused=False,
    ),
    "llama4_text": Row(
        LLAMA,
        {
            "several experts": {
                "num_experts_per_tok": 3,
                "moe_layers": [0, 1, 2],
                "use_qk_norm": False,
                "attention_bias": False,
                "attn_temperature_tuning": False,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 16.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                },
            }
        },
        fused=False,
    ),
    "llama4": Row(
        {
            "text_config": {**COMMON, **LLAMA},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "qwen3_5_moe_text": Row(DELTA, {"one head": {"linear_num_key_heads": 1}}),
    "qwen3_5_moe": Row(
        {
            "text_config": {**COMMON, **DELTA},
            "vision_config": DELTA_VISION,
            "tie_word_embeddings": False,
        },
        fused=False,
    ),
    "kimi_linear": Row(
        {
            **KDA,
            "linear_head_dim": 32,
            "linear_num_heads": 3,
            "linear_conv_kernel_dim": 4,
            "q_lora_rank": None,
        },
        {
            "other sizes": {
                "layer_types": [FULL, LINEAR],
                "linear_num_heads": 1,
                "linear_conv_kernel_dim": 2,
                "q_lora_rank": 28,
                "attention_bias": True,
                "norm_topk_prob": False,
                "n_group": 1,
                "topk_group": 1,
            }
        },
    ),
    "minimax": Row(
        {
            "head_dim": 32,  # the last axis of a state
            "intermediate_size": 40,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "layer_types": [FULL, LINEAR],  # transformers' cache counts tokens in the first
            "block_size": 8,
            "sliding_window": 5,
            "full_attn_alpha_factor": 1.4,
            "full_attn_beta_factor": 0.8,
            "linear_attn_alpha_factor": 1.7,
            "linear_attn_beta_factor": 1.3,
            "mlp_alpha_factor": 0.7,
            "mlp_beta_factor": 1.6,
        },
        {
            "plain": {
                "sliding_window": None,
                "layer_types": [LINEAR, FULL],
                "tie_word_embeddings": True,
                **{
                    f"{half}_{name}_factor": 1.0
                    for half in ("full_attn", "linear_attn", "mlp")
                    for name in ("alpha", "beta")
                },
            }
        },
    ),
    "mimo_v2_flash": Row(
        {
            **DEEPSEEK,
            "num_attention_heads": 8,
            "head_dim": 24,
            "v_head_dim": 20,
            "n_routed_experts": 12,
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["sparse", "dense"],
            "sliding_window": 5,
            "attention_bias": True,
            "attention_value_scale": 0.707,
            "rope_parameters": {
                kind: table | {"partial_rotary_factor": 0.334} for kind, table in BY_KIND.items()
            },
        },
        {
            "wide values": {
                "v_head_dim": 28,
                "attention_value_scale": None,
                "attention_bias": False,
                "layer_types": [FULL, FULL],
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "routed_scaling_factor": None,
            }
        },
    ),
    "bailing_hybrid": Row(
        {**KDA, "head_dim": 32, "short_conv_kernel_size": 4, "kda_lower_bound": -3.0},
        {
            "unbounded": {
                "kda_safe_gate": False,
                "short_conv_kernel_size": 2,
                "attention_bias": True,
                "norm_topk_prob": False,
                "layer_types": [FULL, LINEAR],
                "rope_parameters": MSCALE,
            }
        },
    ),
    "hy_v3": Row(
        {
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "router_scaling_factor": 1.7,
            "mlp_layer_types": ["dense", "sparse"],
            "attention_bias": True,
        },
        {"all sparse": {"mlp_layer_types": ["sparse", "sparse"], "attention_bias": False}},
    ),
    "mistral4": Row(
        MISTRAL,
        {
            "one group": {
                "rope_interleave": False,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
                "q_lora_rank": None,
                "attention_bias": False,
                "first_k_dense_replace": 0,
            }
        },
    ),
    "mistral3": Row(
        {
            "text_config": {"model_type": "mistral4", **COMMON, **MISTRAL},
            "vision_config": {
                **VISION,
            },
            "tie_word_embeddings": False,
        },
        {
            "plain queries": {
                "text_config": {"model_type": "mistral4", **COMMON, **MISTRAL, "q_lora_rank": None}
            }
        },
        fused=False,
    ),
    "mistral_large4": Row(
        {
            "text_config": LARGE,
            "vision_config": {
                "model_type": "pixtral",
                **VISION,
            },
            "tie_word_embeddings": False,
        },
        {
            "one group": {
                "text_config": LARGE
                | {
                    "attention_bias": False,
                    "n_group": 1,
                    "topk_group": 1,
                    "no_rope_layers": [0, 1],
                    "indexer_types": ["full", "shared"],
                    "mlp_layer_types": ["sparse", "sparse"],
                    "rope_parameters": COMMON["rope_parameters"],
                }
            }
        },
        fused=False,
    ),
    "dots3_note": Row(
        {
            "text_config": NOTE,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "mlp_layer_types": ["dense"],
                "adapter_in_dim": 16,
                "adapter_out_dim": 72,
            },
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "feature_size": 8,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": 72,
            },
            "tie_word_embeddings": False,
        },
        {
            "full": {
                "text_config": NOTE
                | {
                    "layer_types": [FULL, SLIDING],
                    "attention_bias": False,
                    "n_group": 1,
                    "topk_group": 1,
                    "norm_topk_prob": False,
                    "rope_parameters": BY_KIND,
                }
            }
        },
        fused=False,
    ),
    "deepseek_v32": Row(
        INDEXED,
        {
            "all sparse": {
                "first_k_dense_replace": 0,
                "n_group": 1,
                "topk_group": 1,
                "attention_bias": False,
                "rope_parameters": MSCALE,
            }
        },
    ),
    "glm_moe_dsa": Row(
        INDEXED | {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
        {"one group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}},
    ),
    "axk2": Row(
        INDEXED | {"n_group": None, "topk_group": None, "gated_norm_rank": 6},
        {
            "all sparse": {
                "mlp_layer_types": ["sparse"] * 2,
                "attention_bias": False,
                "rope_parameters": MSCALE,
            }
        },
    ),
    "kimi_k25": Row(
        {
            "text_config": {**COMMON, **LATENT},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
            },
            "projection_hidden_size": 16,
            "tie_word_embeddings": False,
        },
        {
            "one group": {
                "text_config": {
                    **COMMON,
                    **LATENT,
                    "n_group": 1,
                    "topk_group": 1,
                    "attention_bias": False,
                }
            }
        },
        fused=False,
    ),
    "deepseek_ocr2": Row(
        {
            "text_config": OCR,
            "vision_config": {
                "sam_config": SAM,
                "encoder_config": {
                    "vocab_size": 8,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                },
            },
            "tie_word_embeddings": False,
        },
        {
            "greedy": {
                "text_config": {
                    **OCR,
                    "topk_method": "greedy",
                    "n_group": None,
                    "topk_group": None,
                    "attention_bias": False,
                }
            }
        },
        fused=False,
    ),
    "kolibri1": Row(
        {
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 52,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "layer_types": [SLIDING, FULL],
            "sliding_window": 5,
        },
        {"as they are": {"norm_topk_prob": False, "layer_types": [SLIDING, SLIDING]}},
    ),
    "cohere2_moe": Row(
        {
            "intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "softmax",
            "layer_types": [SLIDING, FULL],
            "mlp_layer_types": ["sparse", "sparse"],
            "sliding_window": 5,
            "logit_scale": 0.7,
            "rms_norm_eps": None,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        {
            "leading dense": {
                "shared_expert_combination_strategy": "sum",
                "expert_selection_fn": "sigmoid",
                "norm_topk_prob": True,
                "layer_types": [FULL, FULL],
                "mlp_layer_types": ["dense", "sparse"],
                "prefix_dense_intermediate_size": 100,
                "rms_norm_eps": 1e-5,
                "attention_bias": False,
            },
            "sigmoids": {
                "num_shared_experts": 0,
                "expert_selection_fn": "sigmoid",
                "norm_topk_prob": False,
                "layer_types": [FULL, SLIDING],
                "mlp_layer_types": ["dense", "sparse"],
                "prefix_dense_sliding_window_pattern": 4,
            },
        },
    ),
    "axk1": Row(
        {**LATENT, "rope_interleave": True, "mlp_layer_types": ["dense", "sparse"]},
        {
            "all sparse": {
                "mlp_layer_types": ["sparse", "sparse"],
                "rope_interleave": False,
                "n_group": 1,
                "topk_group": 1,
                "attention_bias": False,
            }
        },
    ),
    "qwen3_omni_moe": Row(
        {"thinker_config": THINKER, "enable_audio_output": False},
        {
            "plain": {
                "thinker_config": THINKER
                | {
                    "text_config": THINKER["text_config"]
                    | {"attention_bias": False, "norm_topk_prob": False, "mlp_only_layers": []}
                }
            }
        },
        fused=False,
    ),
    "ernie4_5_vl_moe": Row(
        {
            "text_config": ERNIE_TEXT,
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
            },
            "tie_word_embeddings": True,
        },
        {
            "usual": {
                "text_config": ERNIE_TEXT
                | {
                    "moe_norm_min": 1e-12,
                    "moe_num_shared_experts": 0,
                    "mlp_layer_types": ["sparse", "sparse"],
                }
            }
        },
        fused=False,
    ),
    "unlimited_ocr": Row(
        {
            "text_config": PROMPT_WINDOWS,
            "vision_config": {
                "sam_config": SAM,
                "encoder_config": {
                    **VISION,
                },
            },
            "tie_word_embeddings": False,
        },
        {
            "full": {
                "text_config": PROMPT_WINDOWS
                | {"layer_types": [FULL] * 2, "topk_method": "greedy", "attention_bias": False}
            }
        },
        fused=False,
    ),
    "granitemoehybrid": Row(
        {
            **GRANITE,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 6,
            "mamba_d_head": 24,
            "mamba_n_groups": 2,
            "mamba_d_state": 32,  # the last axis of a state
            "mamba_expand": 2,
            "mamba_conv_bias": True,
            "mamba_proj_bias": True,
            "position_embedding_type": None,
        },
        {
            "rotated, one group": {
                "layer_types": ["attention", "mamba"],
                "position_embedding_type": "rope",
                "attention_bias": False,
                "mamba_n_groups": 1,
                "mamba_d_conv": 2,
                "mamba_d_head": "auto",
                "mamba_conv_bias": False,
                "mamba_proj_bias": False,
                "shared_intermediate_size": 20,
                "tie_word_embeddings": False,
            },
            "dense": {"num_local_experts": 0},
        },
    ),
    "nemotron_h": Row(
        {
            "num_hidden_layers": None,  # as many as there are blocks
            "rms_norm_eps": None,
            "layers_block_type": ["linear_attention", "moe", FULL, "mlp"],
            "layer_norm_epsilon": 1e-5,
            "mamba_num_heads": 6,
            "mamba_head_dim": 20,  # 6 x 20 is not 72
            "n_groups": 2,
            "ssm_state_size": 32,  # the last axis of a state
            "use_bias": True,
            "mlp_bias": True,
            "intermediate_size": 100,
            "moe_intermediate_size": 40,
            "moe_shared_expert_intermediate_size": 52,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.7,
        },
        {
            "one group": {
                "layers_block_type": ["moe", "linear_attention", "moe", FULL],
                "n_groups": 1,
                "conv_kernel": 2,
                "use_bias": False,
                "use_conv_bias": False,
                "mlp_bias": False,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": False,
            },
            "latent": {"moe_latent_size": 56},
            "latent without biases": {"moe_latent_size": 88, "mlp_bias": False},
        },
    ),
    "jamba": Row(
        {
            "intermediate_size": 40,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 7,
            "mamba_conv_bias": True,
            "mamba_proj_bias": True,
        },
        {
            "experts beside attention": {
                "attn_layer_offset": 0,
                "expert_layer_offset": 0,
                "mamba_d_conv": 2,
                "mamba_d_state": 8,
                "mamba_dt_rank": "auto",
                "mamba_conv_bias": False,
                "mamba_proj_bias": False,
                "tie_word_embeddings": True,
            }
        },
    ),
    "omni_moe": Row(
        {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "num_experts": 12,
            "expert_groups": [[2, 12], [1, 12]],
            "shared_router": True,
            "router_bias": True,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
        {
            "one router": {"expert_groups": None, "router_bias": False},
            "top 1": {"expert_groups": [[1, 6], [2, 9]], "num_experts_per_tok": 1},
            "separate": {"shared_router": False, "norm_topk_prob": True},
        },
        fused=False,
    ),
    "mm1_moe": Row(
        {
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "moe_layer_freq": 2,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        {"every fourth": {"moe_layer_freq": 4, "norm_topk_prob": False}},
        fused=False,
    ),
}
