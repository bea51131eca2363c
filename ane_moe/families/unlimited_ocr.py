"""Unlimited-OCR, its language model: DeepSeek-OCR-2's layer, with windows of generated tokens that
see all of the prompt too."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, gqa, layer_kinds, listed_dense, llama, text_config
from ane_moe.families.deepseek_ocr2 import KEYS as KEYS
from ane_moe.families.deepseek_ocr2 import TAPS as TAPS
from ane_moe.families.deepseek_v2 import experts, topk_router
from ane_moe.model.spec import LayerSpec, ModelSpec

WINDOWS = "reference_sliding_attention"


def spec(config: Config) -> ModelSpec:
    config = text_config(config)
    config.only("mlp_bias", None, False)
    bias = config.flag("attention_bias")
    full = gqa(config, qkv_bias=bias, o_bias=bias)
    window = replace(full, window=config.integer("sliding_window"), sees_prompt=True)
    kinds = layer_kinds(config, known=(FULL, WINDOWS))
    ffns = listed_dense(config, experts(config, topk_router(config)))
    layers = [
        LayerSpec(window if kind == WINDOWS else full, ffn)
        for kind, ffn in zip(kinds, ffns, strict=True)
    ]
    return llama(config, layers)
