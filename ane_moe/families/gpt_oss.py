"""gpt-oss (gpt-oss-20b, 120b): sinks and biases, windows in every other layer, experts with a
clamped activation whose gate and up alternate."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import clamp, gqa, layer_windows, llama, router
from ane_moe.families.keys import LAYER, SKELETON, KeyTable, expert_keys, fused_experts
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

KEYS: KeyTable = {
    **SKELETON,
    "layers.{layer}.attn.sinks.weight": (f"{LAYER}.self_attn.sinks",),
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.router.weight",),
    "layers.{layer}.ffn.router.bias": (f"{LAYER}.mlp.router.bias",),
    **expert_keys(fused_experts(GATE_UP, DOWN, transposed=True, interleaved=True)),
    **expert_keys(fused_experts(f"{GATE_UP}_bias", f"{DOWN}_bias", interleaved=True), kind="bias"),
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    expert = MlpSpec(config.integer("intermediate_size"), clamp(config), bias=True)
    moe = MoeSpec(router(config, renorm=True, logit_bias=True), expert)
    mixers = [
        gqa(config, qkv_bias=bias, o_bias=bias, sinks=True, window=window)
        for window in layer_windows(config)
    ]
    return llama(config, [LayerSpec(mixer, moe) for mixer in mixers])
