"""ERNIE 4.5 (ERNIE-4.5-21B-A3B): neighbouring channels rotated in pairs, softmax scores with a bias
for the choice, shared experts, dense first layers."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router, shared_expert
from ane_moe.families.keys import (
    LAYER,
    MLP_EXPERTS,
    SKELETON,
    KeyTable,
    Only,
    mlp_keys,
    paired_queries,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **SKELETON,
    **paired_queries(),
    **mlp_keys("ffn.mlp", "mlp"),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (
        Only(f"{LAYER}.mlp.moe_statics.e_score_correction_bias"),
        Only(f"{LAYER}.mlp.gate.moe_statics.e_score_correction_bias"),
    ),
    **MLP_EXPERTS,
    **mlp_keys("ffn.shared", "mlp.shared_experts"),
}
TAPS = Taps(choice_bias="moe_statics.e_score_correction_bias")


def spec(config: Config) -> ModelSpec:
    moe = experts(config)
    first = config.integer("moe_layer_start_index", at_least=0)
    last = config.integer("moe_layer_end_index", at_least=-1)
    last = n_layers(config) - 1 if last == -1 else last
    interval = config.integer("moe_layer_interval")
    ffns = [
        moe
        if first <= number <= last and (number + 1) % interval == 0
        else mlp(config, "intermediate_size")
        for number in range(n_layers(config))
    ]
    return llama(config, [LayerSpec(gqa(config), ffn) for ffn in ffns])


def experts(config: Config) -> MoeSpec:
    """The experts of all ERNIE 4.5 models."""
    if config.flag("use_bias"):
        raise config.wrong("use_bias", "false")
    chosen = router(config, renorm=True, bias=True, renorm_floor=config.number("moe_norm_min"))
    shared = shared_expert(config, "moe_intermediate_size", "moe_num_shared_experts")
    return MoeSpec(chosen, mlp(config, "moe_intermediate_size"), shared)
