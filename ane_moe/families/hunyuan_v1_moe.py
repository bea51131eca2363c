"""Hunyuan (Hunyuan-A13B): q and k normed after their rotation, one shared expert."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import LAYER, MLP_EXPERTS, SKELETON, KeyTable, mlp_keys
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, SharedSpec

KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.attn.q_norm.weight": (f"{LAYER}.self_attn.query_layernorm.weight",),
    "layers.{layer}.attn.k_norm.weight": (f"{LAYER}.self_attn.key_layernorm.weight",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.gate.wg.weight",),
    **MLP_EXPERTS,
    **mlp_keys("ffn.shared", "mlp.shared_mlp"),
}
TAPS = Taps(router="Gate")


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    flat = Config({name: _one(value) for name, value in config.values.items()}, config.where)
    attention = gqa(config, qk_norm="rotated", qkv_bias=bias, o_bias=bias)
    expert = mlp(config, "intermediate_size")
    moe = MoeSpec(router(flat, renorm=True), expert, SharedSpec(expert))
    layers = [LayerSpec(attention, moe)] * n_layers(config)
    return llama(_with_base(config, attention.head_dim), layers)


def _with_base(config: Config, head_dim: int) -> Config:
    """`alpha` makes the base larger once and for all (`HunYuanMoEV1RotaryEmbedding`); what is
    called dynamic without it changes with the length of the text."""
    rope = rope_config(config)
    if rope.values["rope_type"] != "dynamic" or head_dim < 4:
        return config
    base = rope.number("rope_theta") * rope.number("alpha") ** (head_dim / (head_dim - 2))
    own = {"rope_scaling": {"rope_type": "default", "rope_theta": base}}
    return Config(config.values | own, config.where)


def _one(value: object) -> object:
    """A list by layer whose items are all one says just that."""
    return (
        value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value
    )
