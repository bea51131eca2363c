"""MiniMax-M2: q and k norms over the whole projected vector, a part of each head rotated, sigmoid
scores with a bias for the choice."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, llama, mlp, n_layers, router
from ane_moe.families.keys import LAYER, KeyTable
from ane_moe.families.mixtral import KEYS as MIXTRAL
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec

KEYS: KeyTable = {
    **MIXTRAL,
    "layers.{layer}.ffn.router.choice_bias": (
        f"{LAYER}.block_sparse_moe.e_score_correction_bias",
        f"{LAYER}.mlp.e_score_correction_bias",
    ),
}
TAPS = Taps(score="sigmoid", choice_bias="e_score_correction_bias")


def spec(config: Config) -> ModelSpec:
    chosen = router(config, renorm=True, score="sigmoid", bias=True)
    moe = MoeSpec(chosen, mlp(config, "intermediate_size"))
    attention = gqa(config, qk_norm="full")
    layers = [LayerSpec(attention, moe)] * n_layers(config)
    return llama(_with_factor(config, attention.head_dim), layers, partial=True)


def _with_factor(config: Config, head_dim: int) -> Config:
    """The released files say `rotary_dim` in place of a factor (MiniMaxM2Config)."""
    if not config.has("rotary_dim"):
        return config
    factor = {"partial_rotary_factor": config.integer("rotary_dim") / head_dim}
    return Config(factor | config.values, config.where)
