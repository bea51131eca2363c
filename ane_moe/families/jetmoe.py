"""JetMoE (jetmoe-8b): experts in attention too, which share keys and values; one bias after each
sum of experts."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    EPS,
    ROPE,
    decoder,
    full_attention,
    mlp,
    n_layers,
    rope_table,
    router,
)
from ane_moe.families.keys import (
    LAYER,
    SKELETON,
    KeyTable,
    OneMatrix,
    Rows,
    expert_keys,
    fused_experts,
)
from ane_moe.families.rope import rope_config
from ane_moe.families.taps import Taps
from ane_moe.model.moa import MoaSpec
from ane_moe.model.spec import HeadSpec, LayerSpec, ModelSpec, MoeSpec, NormSpec

ATTENTION, EXPERTS = f"{LAYER}.self_attention", f"{LAYER}.self_attention.experts"
INPUT, OUTPUT = "input_linear.weight", "output_linear.weight"
NORM_EPS = 1e-6  # of JetMoeDecoderLayer's norms, whatever the file says of the last

KEYS: KeyTable = {
    **{ours: entries for ours, entries in SKELETON.items() if ".attn." not in ours},
    "layers.{layer}.attn.norm.weight": SKELETON["layers.{layer}.attn.norm.weight"],
    "layers.{layer}.attn.router.weight": (f"{EXPERTS}.router.layer.weight",),
    "layers.{layer}.attn.q.weight": (OneMatrix(f"{EXPERTS}.{INPUT}", "below"),),
    "layers.{layer}.attn.k.weight": (Rows(f"{ATTENTION}.kv_proj.weight", 0, 2),),
    "layers.{layer}.attn.v.weight": (Rows(f"{ATTENTION}.kv_proj.weight", 1, 2),),
    "layers.{layer}.attn.o.weight": (OneMatrix(f"{EXPERTS}.{OUTPUT}", "beside"),),
    "layers.{layer}.attn.o.bias": (f"{EXPERTS}.bias",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.layer.weight",),
    **expert_keys(fused_experts(f"mlp.{INPUT}", f"mlp.{OUTPUT}")),
    # Weights of the chosen sum up to 1: what is added to the sum may be added to each of them.
    "layers.{layer}.ffn.experts.{expert}.down.bias": (f"{LAYER}.mlp.bias",),
}
TAPS = Taps(router="TopKGating", logits=4, sorted_block="mlp", gate_up=INPUT, down=OUTPUT)


def spec(config: Config) -> ModelSpec:
    config = config.renamed({"activation_function": "hidden_act", "kv_channels": "head_dim"})
    full_attention(config)
    head_dim, rope = config.integer("head_dim"), rope_config(config)
    rope.only("partial_rotary_factor", None, 1)
    chosen = router(config, renorm=True)
    heads, scale = config.integer("num_key_value_heads"), head_dim**-0.5
    mixer = MoaSpec(heads, head_dim, chosen.experts, chosen.k, scale, ROPE)
    moe = MoeSpec(chosen, mlp(config, "intermediate_size", bias="down"))
    layers = [LayerSpec(mixer, moe)] * n_layers(config)
    head = HeadSpec(config.flag("tie_word_embeddings"), eps=config.number(*EPS))
    ropes = {ROPE: rope_table(rope, head_dim)}
    return decoder(config, layers, ropes=ropes, norm=NormSpec(NORM_EPS), head=head)
