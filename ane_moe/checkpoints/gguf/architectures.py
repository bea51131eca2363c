"""What llama.cpp's architectures are in transformers' words: one entry each.

Source: llama.cpp's converter (`conversion/`), and its graphs (`src/models/`) for what a file does
not say. Facts that no metadata give, such as whether the chosen experts' weights are made to sum to
1, are built into llama.cpp's code for the architecture, and so into the entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stacks:
    """Tensors of a layer's experts where transformers has them together. `turned`: what enters a
    matrix comes first, and gate and up alternate; biases are beside them."""

    gate_up: str
    down: str
    turned: bool = False


@dataclass(frozen=True)
class Architecture:
    """`fields`: config.json's field by the metadata key after the architecture's name; `fixed`:
    fields that have one value, where no metadata give another; `agreeing`: metadata that must have
    the value; `biases`: the fields that say whether there are tensors of that name.

    `names`: what a tensor of a layer is called there and in transformers, without `weight` and
    `bias`; `top`: the same outside of layers. `experts` is the module in which they lie, one by
    one; `stacks` the tensors into which they are put together, where transformers has them so.
    `neighbours`: heads of queries and keys are rotated in pairs of neighbours. `kinds` of layers
    follow each other in turn; `yarn`: fields of that kind of rotary table which no metadata give.
    `partial`: a part of each head is rotated. `normed`: the field that says whether queries and
    keys are.
    """

    model_type: str
    fields: Mapping[str, str]
    names: Mapping[str, str]
    experts: str = ""
    stacks: Stacks | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    agreeing: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    top: Mapping[str, str] = field(default_factory=dict)
    neighbours: bool = False
    kinds: tuple[str, ...] = ()
    yarn: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    normed: str = ""


FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "vocab_size": "vocab_size",
}
LOCAL = FIELDS | {"expert_count": "num_local_experts"}
WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
ROUTED = {**ATTENTION, "ffn_gate_inp": "mlp.gate"}
SILU = {"hidden_act": "silu"}
SOFTMAX, SIGMOID = ({"expert_gating_func": number, "expert_group_count": 1} for number in (1, 2))

# DeepSeek-V3's router in one group, shared experts, dense first layers.
CHOSEN = {
    **{key: name for key, name in FIELDS.items() if key != "expert_count"},
    **WIDTH,
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}
CHOOSING = {
    **ROUTED,
    **MLP,
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}

ARCHITECTURES = {
    "glm4moe": Architecture(
        "glm4_moe",
        CHOSEN | {"nextn_predict_layers": "num_nextn_predict_layers"},
        CHOOSING | {"post_attention_norm": "post_attention_layernorm"},
        experts="mlp",
        fixed=SILU | ONE_GROUP,
        agreeing=SIGMOID,
        biases={"attention_bias": "attn_q"},
        partial=True,
        normed="use_qk_norm",
    ),
    "dots1": Architecture(
        "dots1",
        CHOSEN,
        CHOOSING,
        experts="mlp",
        fixed=SILU | ONE_GROUP | {"sliding_window": None},
        agreeing=SIGMOID,
        biases={"attention_bias": "attn_q"},
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        LOCAL | {"expert_feed_forward_length": "intermediate_size"},
        {
            **ATTENTION,
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b": "block_sparse_moe.e_score_correction_bias",
        },
        experts="block_sparse_moe",
        fixed=SILU,
        agreeing=SIGMOID,
        partial=True,
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        FIELDS | WIDTH,
        ROUTED,
        experts="mlp",
        fixed=SILU
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "use_sliding_window": False},
        agreeing=SOFTMAX,
        biases={"attention_bias": "attn_q"},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        FIELDS | WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        ROUTED | SHARED,
        experts="mlp",
        fixed=SILU
        | {"norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False},
        agreeing=SOFTMAX,
        biases={"qkv_bias": "attn_q"},
    ),
    "olmoe": Architecture(
        "olmoe",
        FIELDS,
        ROUTED,
        experts="mlp",
        fixed=SILU | {"norm_topk_prob": False, "clip_qkv": None},
        agreeing=SOFTMAX,
        biases={"attention_bias": "attn_q"},
    ),
    "llama": Architecture(
        "mixtral",
        LOCAL | {"attention.sliding_window": "sliding_window"},
        ATTENTION | {"ffn_gate_inp": "block_sparse_moe.gate"},
        experts="block_sparse_moe",
        fixed=SILU | {"sliding_window": None},
        agreeing=SOFTMAX,
        neighbours=True,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        LOCAL
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        ATTENTION | {"ffn_gate_inp": "block_sparse_moe.router.layer"},
        stacks=Stacks(
            "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.output_linear.weight",
        ),
        fixed=SILU,
        agreeing=SOFTMAX,
        biases={"attention_bias": "attn_q"},
        neighbours=True,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        LOCAL
        | {
            "attention.sliding_window": "sliding_window",
            "expert_feed_forward_length": "intermediate_size",
        },
        ATTENTION
        | {
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "post_attention_norm": "post_attention_layernorm",
        },
        stacks=Stacks("mlp.experts.gate_up_proj", "mlp.experts.down_proj", turned=True),
        fixed=SILU | {"swiglu_limit": 7.0},
        biases={"attention_bias": "attn_q"},
        kinds=("sliding_attention", "full_attention"),
        yarn={"truncate": False},
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        FIELDS
        | WIDTH
        | {
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_scale": "routed_scaling_factor",
            "shortconv.l_cache": "conv_L_cache",
        },
        {
            "attn_norm": "operator_norm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "ffn_norm": "ffn_norm",
            "ffn_gate": "feed_forward.w1",
            "ffn_up": "feed_forward.w3",
            "ffn_down": "feed_forward.w2",
            "ffn_gate_inp": "feed_forward.gate",
            "exp_probs_b": "feed_forward.expert_bias",
            "shortconv.conv": "conv.conv",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
        experts="feed_forward",
        fixed=SILU | {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
        agreeing=SIGMOID,
        biases={"conv_bias": "shortconv.conv", "use_expert_bias": "exp_probs_b"},
        top={"token_embd_norm": "model.embedding_norm", "output_norm": "model.embedding_norm"},
    ),
}
