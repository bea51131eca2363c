"""DeepSeek-V2 (DeepSeek-V2-Lite): latent attention, softmax scores, of groups by their best expert,
shared experts, dense first layers."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import leading_dense, router
from ane_moe.families.deepseek_v3 import KEYS as KEYS
from ane_moe.families.deepseek_v3 import experts as experts
from ane_moe.families.deepseek_v3 import latent_model
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec, RouterSpec

TAPS = Taps(groups=("num_group", "topk_group"), group_best=1)


def spec(config: Config) -> ModelSpec:
    config.only("mlp_bias", None, False)
    return latent_model(config, leading_dense(config, experts(config, topk_router(config))))


def topk_router(config: Config) -> RouterSpec:
    """transformers' `DeepseekV2TopkRouter` renormalises nothing, whatever `norm_topk_prob` says."""
    chosen = router(config, renorm=False, scale=config.number("routed_scaling_factor"))
    config.only("topk_method", "greedy", "group_limited_greedy")
    if config.values["topk_method"] == "greedy":
        return chosen
    groups, opened = config.integer("n_group"), config.integer("topk_group")
    if chosen.experts % groups or not chosen.k <= opened * (chosen.experts // groups):
        raise config.wrong("n_group", f"a divisor of the number of experts, {chosen.experts}")
    return replace(chosen, groups=groups, open_groups=opened, group_best=1)
