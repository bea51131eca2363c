"""Nemotron-H (Nemotron-3-Nano-30B-A3B; Nemotron-3-Super-120B-A12B, whose experts work on a latent):
a layer is one block, of Mamba-2, attention without rotation, experts or an MLP; these have no gate,
but a square."""

from ane_moe.families.config import MAX_LAYERS, Config
from ane_moe.families.decoder import FULL, decoder, gqa, sigmoid_router
from ane_moe.families.granitemoehybrid import LINEAR, OLDER, mamba2, mamba_keys
from ane_moe.families.keys import LAYER, Fused, KeyTable
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LatentSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, SharedSpec

MOE, DENSE = "moe", "mlp"
PATTERN = {"M": LINEAR, "*": FULL, "E": MOE, "-": DENSE}  # how older files spell the layers
SIZES = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "taps": "conv_kernel",
}
BLOCK = f"{LAYER}.mixer"
MATRICES = ("up", "down")
LATENT = {"latent_in": "fc1_latent_proj", "latent_out": "fc2_latent_proj"}

KEYS: KeyTable = {
    "embed.weight": ("model.embeddings.weight",),
    "head.norm.weight": ("model.norm_f.weight",),
    "head.rows.weight": ("lm_head.weight",),
    **{
        f"layers.{{layer}}.{half}.norm.weight": (f"{LAYER}.norm.weight",)
        for half in ("attn", "ffn")
    },
    **{f"layers.{{layer}}.attn.{name}.weight": (f"{BLOCK}.{name}_proj.weight",) for name in "qkv"},
    **mamba_keys(BLOCK, BLOCK),
    "layers.{layer}.ffn.router.weight": (f"{BLOCK}.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{BLOCK}.gate.e_score_correction_bias",),
    **{
        f"layers.{{layer}}.ffn.{ours}.{kind}": (f"{BLOCK}.{theirs}.{kind}",)
        for ours, theirs in LATENT.items()
        for kind in ("weight", "bias")
    },
    **{
        f"layers.{{layer}}.ffn.experts.{{expert}}.{name}.weight": (
            f"{BLOCK}.experts.{{expert}}.{name}_proj.weight",
            Fused(f"{BLOCK}.experts.{name}_proj"),
        )
        for name in MATRICES
    },
    **{
        f"layers.{{layer}}.ffn.{ours}.{name}.{kind}": (f"{theirs}.{name}_proj.{kind}",)
        for ours, theirs in {"mlp": BLOCK, "shared": f"{BLOCK}.shared_experts"}.items()
        for name in MATRICES
        for kind in ("weight", "bias")
    },
}
TAPS = Taps(
    ffn_norm="norm",
    score="sigmoid",
    choice_bias="e_score_correction_bias",
    groups=("num_group", "topk_group"),
    alone=("Mamba2Mixer", "Attention"),
    latent=f"mixer.{LATENT['latent_in']}",
)


def spec(config: Config) -> ModelSpec:
    # Fields that would be other maths, and those that transformers' code does not read.
    config.only("sliding_window", None)
    for field in ("attention_bias", "tie_word_embeddings"):
        config.only(field, None, False)
    config.only("mlp_hidden_act", "relu2")
    config.only("mamba_hidden_act", None, "silu")
    blocks = {
        LINEAR: LayerSpec(mamba2(config, SIZES, "layer_norm_epsilon", bias="use_bias"), None),
        FULL: LayerSpec(gqa(config, rope=None), None),
    }
    kinds = _kinds(config)
    if MOE in kinds:
        blocks[MOE] = LayerSpec(None, _experts(config))
    if DENSE in kinds:
        blocks[DENSE] = LayerSpec(None, _mlp(config, "intermediate_size"))
    return decoder(config, [blocks[kind] for kind in kinds], ropes={})


def _kinds(config: Config) -> list[str]:
    given = [name for name in ("layers_block_type", "layer_types") if config.has(name)]
    field = given[0] if given else "hybrid_override_pattern"
    if given:
        kinds = [OLDER.get(kind, kind) for kind in config.strings(field)]
    else:
        kinds = [PATTERN.get(letter, letter) for letter in str(config.values.get(field, ""))]
    if not 0 < len(kinds) <= MAX_LAYERS or set(kinds) - {*PATTERN.values()}:
        raise config.wrong(field, f"up to {MAX_LAYERS} of {', '.join(PATTERN.values())}")
    return kinds


def _experts(config: Config) -> MoeSpec:
    expert = MlpSpec(config.integer("moe_intermediate_size"), squared=True)
    shared = SharedSpec(_mlp(config, "moe_shared_expert_intermediate_size"))
    latent = None
    if config.has("moe_latent_size"):
        latent = LatentSpec(config.integer("moe_latent_size"), config.flag("mlp_bias"))
    return MoeSpec(sigmoid_router(config), expert, shared, latent=latent)


def _mlp(config: Config, width: str) -> MlpSpec:
    return MlpSpec(config.integer(width), bias=config.flag("mlp_bias"), squared=True)
