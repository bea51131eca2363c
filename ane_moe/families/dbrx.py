"""DBRX (dbrx-instruct): one clipped matrix for queries, keys and values, LayerNorms, experts one
below the other."""

from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import KeyTable, Runs, Stacked
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec

BLOCK = "transformer.blocks.{layer}"
ATTENTION, EXPERTS = f"{BLOCK}.norm_attn_norm.attn", f"{BLOCK}.ffn.experts.mlp"
PARTS = {"q": "query_rows", "k": "key_rows", "v": "value_rows"}
EXPERT = "layers.{layer}.ffn.experts.{expert}"
KEYS: KeyTable = {
    "embed.weight": ("transformer.wte.weight",),
    "head.norm.weight": ("transformer.norm_f.weight",),
    "head.rows.weight": ("lm_head.weight",),
    "layers.{layer}.attn.norm.weight": (f"{BLOCK}.norm_attn_norm.norm_1.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{BLOCK}.norm_attn_norm.norm_2.weight",),
    **{
        f"layers.{{layer}}.attn.{name}.weight": (
            Runs(f"{ATTENTION}.Wqkv.weight", tuple(PARTS.values()), part),
        )
        for name, part in PARTS.items()
    },
    "layers.{layer}.attn.o.weight": (f"{ATTENTION}.out_proj.weight",),
    "layers.{layer}.ffn.router.weight": (f"{BLOCK}.ffn.router.layer.weight",),
    f"{EXPERT}.gate.weight": (Stacked(f"{EXPERTS}.w1"),),
    f"{EXPERT}.up.weight": (Stacked(f"{EXPERTS}.v1"),),
    f"{EXPERT}.down.weight": (Stacked(f"{EXPERTS}.w2", transposed=True),),
}
TAPS = Taps(
    ffn_norm="norm_attn_norm.norm_2", logits=0, layers="blocks", values="", up="v1", down="w2"
)
EPS = 1e-5  # torch's own, which the file does not say
# What DBRX's files call the usual fields.
TOP = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
}
INNER = {
    "attn_config": {
        "kv_n_heads": "num_key_value_heads",
        "clip_qkv": "clip_qkv",
        "rope_theta": "rope_theta",
    },
    "ffn_config": {
        "ffn_hidden_size": "intermediate_size",
        "moe_num_experts": "num_experts",
        "moe_top_k": "num_experts_per_tok",
        "moe_normalize_expert_weights": "moe_normalize_expert_weights",
    },
}

UNSAID = {"moe_normalize_expert_weights": 1}  # in the published file


def spec(config: Config) -> ModelSpec:
    usual = _usual(config)
    usual.only("moe_normalize_expert_weights", None, 1)
    attention = gqa(usual, clip_qkv=usual.number("clip_qkv"))  # transformers takes no other
    chosen = router(usual, renorm=usual.has("moe_normalize_expert_weights"))
    layer = LayerSpec(attention, MoeSpec(chosen, mlp(usual, "intermediate_size")))
    return llama(usual, [layer] * n_layers(usual), norm=NormSpec(EPS, "layer"))


def _usual(config: Config) -> Config:
    """The fields by the names that other families have. The first files give the rotary base with
    attention's fields."""
    values = {new: config.values.get(old) for old, new in TOP.items()} | {"rms_norm_eps": EPS}
    given: dict[str, Any] = dict(UNSAID)
    for name, fields in INNER.items():
        own = config.values.get(name)
        if not isinstance(own, dict):
            raise config.wrong(name, "an object")
        given |= own
        values |= {new: given.get(old) for old, new in fields.items()}
    activation = given.get("ffn_act_fn")
    values["hidden_act"] = activation.get("name") if isinstance(activation, dict) else "silu"
    return Config(config.values | values, config.where)
