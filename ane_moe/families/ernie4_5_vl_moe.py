"""ERNIE 4.5 VL (ERNIE-4.5-VL-28B-A3B), its language model: ERNIE 4.5's layer. Text passes text's
experts alone; those for images are left out. Without images all three positions of a token are one,
and rotation is the usual one."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, listed_dense, llama, text_config
from ane_moe.families.ernie4_5_moe import KEYS as ERNIE
from ane_moe.families.ernie4_5_moe import experts
from ane_moe.families.keys import (
    LAYER,
    KeyTable,
    Only,
    Turned,
    each_expert,
    expert_keys,
    fused_experts,
)
from ane_moe.families.taps import Taps
from ane_moe.model.spec import LayerSpec, ModelSpec

TEXT = "mlp.text_moe"
# Of experts and biases those for text come first.
KEYS: KeyTable = {
    **ERNIE,
    "layers.{layer}.ffn.router.weight": (
        Turned(f"{LAYER}.mlp.gate.weight"),
        f"{LAYER}.{TEXT}.gate.weight",
    ),
    "layers.{layer}.ffn.router.choice_bias": (
        Only(f"{LAYER}.mlp.moe_statics.e_score_correction_bias", of=2),
        Only(f"{LAYER}.{TEXT}.gate.moe_statics.e_score_correction_bias"),
    ),
    **expert_keys(
        each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        fused_experts(f"{TEXT}.experts.gate_up_proj", f"{TEXT}.experts.down_proj"),
    ),
}
TAPS = Taps(choice_bias="moe_statics.e_score_correction_bias", shared="mlp.shared_experts")
BESIDE = {
    "experts for images": r"^model\.layers\.\d+\.mlp\."
    r"(experts\.\d+\.|vision_moe\.|gate\.weight_1$)",
    "what brings images to the width of text": r"^(model\.)?resampler_model\.",
}


def spec(config: Config) -> ModelSpec:
    config = text_config(config)
    widths = config.integers("moe_intermediate_size")  # for text, and for images
    if len(widths) != 2:
        raise config.wrong("moe_intermediate_size", "two whole numbers")
    config = Config(config.values | {"moe_intermediate_size": widths[0]}, config.where)
    attention = gqa(config)
    ffns = listed_dense(config, experts(config), lambda number: "sparse" if number else "dense")
    return llama(config, [LayerSpec(attention, ffn) for ffn in ffns])
