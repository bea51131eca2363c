"""A.X-K1: DeepSeek-V3's layer, with a norm of what experts add, and no bias for their choice in the
released files."""

from collections.abc import Callable, Collection
from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import listed_dense, sigmoid_router
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import experts, latent_model
from ane_moe.families.keys import LAYER, KeyTable
from ane_moe.families.taps import DEEPSEEK
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec, RouterSpec

KEYS: KeyTable = {
    **DEEPSEEK_V3,
    "layers.{layer}.ffn.residual.after.weight": (
        f"{LAYER}.post_mlp_layernorm.weight",
        f"{LAYER}.mlp.post_mlp_layernorm.weight",
    ),
}
TAPS = replace(DEEPSEEK, after="mlp.post_mlp_layernorm")
BESIDE = {"norms that dense layers do not use": r"^model\.layers\.\d+\.post_mlp_layernorm\.weight$"}


def spec(config: Config) -> ModelSpec:
    ffns = listed_dense(config, experts(config, sigmoid_router(config)), by_count(config))
    plain = latent_model(config, ffns, interleaved=config.flag("rope_interleave"))
    return replace(plain, layers=tuple(map(_normed, plain.layers)))


def by_count(config: Config) -> Callable[[int], str]:
    """Older files count dense layers (AXK1Config)."""
    first, step = (
        config.integer(name, at_least=least) if config.has(name) else 1
        for name, least in (("first_k_dense_replace", 0), ("moe_layer_freq", 1))
    )
    return lambda number: "sparse" if number >= first and number % step == 0 else "dense"


def as_stored(spec: ModelSpec, names: Collection[str]) -> ModelSpec:
    """Without the bias for the choice where no layer has one: transformers takes zeros."""
    if any(name.endswith(".e_score_correction_bias") for name in names):
        return spec
    return replace(spec, layers=tuple(map(_unbiased, spec.layers)))


def _normed(layer: LayerSpec) -> LayerSpec:
    return replace(layer, ffn_norms="around") if isinstance(layer.ffn, MoeSpec) else layer


def _unbiased(layer: LayerSpec) -> LayerSpec:
    if not isinstance(layer.ffn, MoeSpec) or not isinstance(layer.ffn.router, RouterSpec):
        return layer
    router = replace(layer.ffn.router, bias=False)
    return replace(layer, ffn=replace(layer.ffn, router=router))
