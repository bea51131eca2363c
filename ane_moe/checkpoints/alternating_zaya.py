"""ZAYA1 as Zyphra first stored it (ZAYA1-8B-legacy, ZAYA1-base): attention and experts are layers
of their own, in turn, and experts are stored one by one. Read as transformers has it.

Source: transformers' convert_zaya_weights_to_hf.py. A residual's vectors stand at the entry of the
next layer there, and at the end of their own here.
"""

import re
from collections.abc import Collection
from typing import Any

from ane_moe.errors import UserError

MARK = ".zaya_block."
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"zaya_block\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight")
ATTENTION = {
    "self_attn.qkv.conv_qk.0.": "self_attn.qkv_proj.conv_qk_depthwise.",
    "self_attn.qkv.conv_qk.1.": "self_attn.qkv_proj.conv_qk_grouped.",
    "self_attn.qkv.temp": "self_attn.qk_norm.temp",
    "self_attn.qkv.linear_q.": "self_attn.qkv_proj.q_proj.",
    "self_attn.qkv.linear_k.": "self_attn.qkv_proj.k_proj.",
    "self_attn.qkv.val_proj1.": "self_attn.qkv_proj.v_proj_current.",
    "self_attn.qkv.val_proj2.": "self_attn.qkv_proj.v_proj_delayed.",
    "self_attn.": "self_attn.",
    "input_norm.": "input_layernorm.",
}
FFN = {
    "zaya_block.router.rmsnorm_eda.": "mlp.gate.router_mlp.norm.",
    "zaya_block.router.router_mlp.0.": "mlp.gate.router_mlp.fc1.",
    "zaya_block.router.router_mlp.2.": "mlp.gate.router_mlp.fc2.",
    "zaya_block.router.router_mlp.4.": "mlp.gate.router_mlp.out_proj.",
    "zaya_block.router.": "mlp.gate.",
    "input_norm.": "post_attention_layernorm.",
    "res_scale.": "post_attention_residual_scale.",
}
ACTIVATIONS = {"swiglu": "silu"}
KINDS = {"full_attention": "hybrid", "sliding_attention": "hybrid_sliding"}


def is_alternating(config: dict[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") == "zaya" and any(MARK in name for name in names)


def native_name(name: str, layers: int) -> str:
    """transformers' name of a tensor; `layers` are those of the file. Unknown names stay as they
    are."""
    if name.startswith("model.res_scale."):
        vector = name.removeprefix("model.res_scale.")
        return f"model.layers.{layers // 2 - 1}.post_mlp_residual_scale.{vector}"
    matched = LAYER.fullmatch(name)
    if matched is None:
        return name
    number, rest = int(matched[1]), matched[2]
    own = f"model.layers.{number // 2}."
    if number % 2:
        if expert := EXPERT.fullmatch(rest):
            matrix = "gate_up_proj" if expert[2] == "1" else "down_proj"
            return f"{own}mlp.experts.{expert[1]}.{matrix}"
        return own + _renamed(rest, FFN)
    if rest.startswith("res_scale."):
        vector = rest.removeprefix("res_scale.")
        entry = (
            f"model.layers.{number // 2 - 1}.post_mlp_residual_scale." if number else "model.input_"
        )
        return entry + vector
    return own + _renamed(rest, ATTENTION)


def _renamed(rest: str, table: dict[str, str]) -> str:
    start = next((start for start in table if rest.startswith(start)), "")
    return table[start] + rest.removeprefix(start) if start else rest


def native_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers' config.json of the same model. Raises UserError for a number of layers that is
    odd."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers % 2:
        raise UserError(f"{where}: layers that alternate are even in number", repr(layers))
    windows = [int(window) for window in config.get("swa_layers") or []]
    widest = max(windows, default=0)
    # The file's window counts tokens before a token; transformers' has the token itself.
    window = config.get("sliding_window") or (widest + 1 if widest else None)
    tables = {
        "hybrid": config.get("rope_theta"),
        "hybrid_sliding": config.get("swa_rotary_base", 10_000.0),
    }
    factor = config.get("partial_rotary_factor", 0.5)
    width = config.get("ffn_hidden_size", config.get("intermediate_size"))
    renamed = {
        "num_hidden_layers": layers // 2,
        "layer_types": _layer_types(config, windows, layers),
        "sliding_window": window,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
            for kind, theta in tables.items()
        },
        "moe_intermediate_size": width // 2 if isinstance(width, int) else width,
        "num_experts_per_tok": config.get("num_experts_per_tok", config.get("moe_router_topk")),
        "rms_norm_eps": config.get("rms_norm_eps", config.get("norm_epsilon")),
        "router_hidden_size": config.get(
            "router_hidden_size", _of_all(config.get("zaya_mlp_expansion"))
        ),
        "num_key_value_heads": config.get("num_query_groups", config.get("num_key_value_heads")),
        "hidden_act": ACTIVATIONS.get(
            config.get("activation_func", ""), config.get("hidden_act", "")
        ),
        "cca_time0": config.get("cca_time0", 2),
        "cca_time1": config.get("cca_time1", 2),
    }
    old = {"swa_layers", "rope_theta", "rope_scaling", "intermediate_size", "partial_rotary_factor"}
    return {name: value for name, value in config.items() if name not in old} | renamed


def _layer_types(config: dict[str, Any], windows: list[int], layers: int) -> list[str]:
    kinds = config.get("layer_types") or [
        "sliding_attention" if window else "full_attention" for window in windows
    ]
    kinds = kinds or ["full_attention"] * layers
    each = kinds[::2] if len(kinds) == layers else kinds
    return [KINDS.get(kind, kind) for kind in each]


def _of_all(value: Any) -> Any:
    """One number, where a list has it for the layers with a router and 0 for the others."""
    return max(value) if isinstance(value, list) and value else value
