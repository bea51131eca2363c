"""dots 3 note, its language model: latent attention with a gate for each head and a norm of the key
that heads share, in windows with sizes of their own, or to the tokens that an indexer chooses."""

from collections.abc import Iterator
from typing import Any

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    FULL,
    SLIDING,
    decoder,
    layer_kinds,
    listed_dense,
    mlp,
    of_layer,
    sigmoid_router,
    text_config,
)
from ane_moe.families.deepseek_v3 import ATTENTION, latent_attention
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import TAPS as TAPS
from ane_moe.families.deepseek_v32 import BESIDE as BESIDE
from ane_moe.families.deepseek_v32 import PAIRED_INDEX_KEYS, indexer
from ane_moe.families.keys import KeyTable, Paired
from ane_moe.families.rope import rope_config, rope_spec
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, SharedSpec

INDEXED = "indexed_attention"
KINDS = (INDEXED, SLIDING, FULL)
# What layers with windows have of their own, in published files as `swa_*`.
SIZES = (
    *("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "head_dim"),
    *("qk_nope_head_dim", "v_head_dim"),
)

KEYS: KeyTable = {
    **DEEPSEEK_V3,
    **PAIRED_INDEX_KEYS,
    "layers.{layer}.attn.gate.weight": (f"{ATTENTION}.g_proj.weight",),
    "layers.{layer}.attn.k_norm.weight": (
        Paired(f"{ATTENTION}.k_rope_only_layernorm.weight", "rotated"),
    ),
}


def spec(config: Config) -> ModelSpec:
    config = _usual(text_config(config) if config.has("text_config") else config)
    config.only("mlp_bias", None, False)
    kinds = layer_kinds(config, known=KINDS)
    mixers = [_mixer(of_layer(config, number) or config, kind) for number, kind in enumerate(kinds)]
    if len(set(zip(kinds, mixers, strict=True))) > len(set(kinds)):
        raise config.wrong("per_layer_config", "the same sizes in all layers of a kind")
    shared = config.integer("n_shared_experts") * config.integer("shared_experts_intermediate_size")
    router, expert = sigmoid_router(config), mlp(config, "moe_intermediate_size")
    ffns = listed_dense(config, MoeSpec(router, expert, SharedSpec(MlpSpec(shared))))
    ropes = {kind: _rope(config, kind, mixer) for kind, mixer in zip(kinds, mixers, strict=True)}
    layers = [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return decoder(config, layers, ropes=ropes)


def _mixer(config: Config, kind: str) -> MlaSpec:
    d_model, q_rank = config.integer("hidden_size"), config.integer("q_lora_rank")
    config.only("num_key_value_heads", None, config.integer("num_attention_heads"))
    head = config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim")
    return latent_attention(
        config,
        scale=head**-0.5 * (d_model / q_rank) ** 0.5,
        latent_scale=(d_model / config.integer("kv_lora_rank")) ** 0.5,
        latent_eps=config.number("rms_norm_eps"),
        rope=kind,
        window=config.integer("sliding_window") if kind == SLIDING else None,
        indexer=indexer(config, interleaved=True) if kind == INDEXED else None,
        gated=True,
        key_norm=True,
    )


def _rope(config: Config, kind: str, mixer: MlaSpec) -> Any:
    tables = config.values.get("rope_parameters")
    if not isinstance(tables, dict) or not isinstance(tables.get(kind), dict):
        raise config.wrong("rope_parameters", f"an object for each kind of layer, {kind} too")
    rope = rope_config(Config({"rope_parameters": tables[kind]}, config.where))
    rope.only("rope_type", "default")
    return rope_spec(rope, mixer.rotated)


def _usual(config: Config) -> Config:
    """The fields as transformers saves them. In published files what is of windows has names of its
    own, and layers with an indexer are those of full attention."""
    if config.has("per_layer_config") or not config.has("swa_head_dim"):
        return config
    own = {name: config.integer(f"swa_{name}") for name in SIZES}
    own["qk_rope_head_dim"] = own["head_dim"] - own["qk_nope_head_dim"]
    config.only("use_dsa", None, True)
    kinds = [INDEXED if kind == FULL else kind for kind in config.strings("layer_types")]
    thetas = {INDEXED: "rope_theta", SLIDING: "swa_rope_theta"}
    fields = {
        "layer_types": kinds,
        "per_layer_config": {str(n): own for n, kind in enumerate(kinds) if kind == SLIDING},
        "rope_parameters": {kind: _table(config, thetas[kind]) for kind in dict.fromkeys(kinds)},
        "mlp_layer_types": list(_ffn_kinds(config, len(kinds))),
    }
    renamed = {
        "sliding_window_size": "sliding_window",
        "moe_shared_expert_intermediate_size": "shared_experts_intermediate_size",
    }
    return Config(config.renamed(renamed).values | fields, config.where)


def _table(config: Config, theta: str) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": config.number(theta)}


def _ffn_kinds(config: Config, count: int) -> Iterator[str]:
    first = config.integer("first_k_dense_replace", at_least=0)
    config.only("moe_layer_freq", None, 1)
    yield from ("dense" if number < first else "sparse" for number in range(count))
