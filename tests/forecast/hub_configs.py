"""The fields of published config.json files that sizes depend on."""

from typing import Any

QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936, "max_position_embeddings": 40960,
    "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True,
    "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "use_sliding_window": False, "sliding_window": None, "bos_token_id": 151643, "eos_token_id": 151645,
}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
}
ZAYA1_8B: dict[str, Any] = {
    "model_type": "zaya", "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 1,
    "moe_intermediate_size": 2048, "router_hidden_size": 256, "vocab_size": 262272, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "layer_types": ["hybrid"] * 40, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "cca_time0": 2, "cca_time1": 2, "attention_bias": False, "lm_head_bias": False, "sliding_window": None,
    "rope_parameters": {
        "hybrid": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
        "hybrid_sliding": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "rope_type": "default",         # stray, as the Hub's file has it
    },
}
LFM2_8B_A1B: dict[str, Any] = {
    "model_type": "lfm2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792,
    "intermediate_size": 7168, "num_dense_layers": 2, "vocab_size": 65536, "max_position_embeddings": 128000,
    "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "norm_topk_prob": True, "use_expert_bias": True,
    "routed_scaling_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 7,
}
GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
    "intermediate_size": 2880, "vocab_size": 201088, "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
OLMOE: dict[str, Any] = {
    "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024,
    "vocab_size": 50304, "max_position_embeddings": 4096, "tie_word_embeddings": False, "norm_topk_prob": False,
    "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "bos_token_id": None, "eos_token_id": 50279,
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 1408, "intermediate_size": 10944,
    "vocab_size": 102400, "max_position_embeddings": 163840,
}
QWEN15_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "intermediate_size": 5632, "vocab_size": 151936,
    "max_position_embeddings": 8192, "decoder_sparse_step": 1, "norm_topk_prob": False, "tie_word_embeddings": False,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "use_sliding_window": False, "sliding_window": 32768, "bos_token_id": 151643, "eos_token_id": 151643,
}
