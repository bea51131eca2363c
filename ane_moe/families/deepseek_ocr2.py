"""DeepSeek-OCR-2, its language model: attention without a latent, and DeepSeek-V2's experts."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import gqa, listed_dense, llama, text_config
from ane_moe.families.deepseek_v2 import TAPS as TAPS
from ane_moe.families.deepseek_v2 import experts, topk_router
from ane_moe.families.keys import DEEPSEEK_FFN, SKELETON, KeyTable
from ane_moe.model.spec import LayerSpec, ModelSpec

KEYS: KeyTable = {**SKELETON, **DEEPSEEK_FFN}


def spec(config: Config) -> ModelSpec:
    config = text_config(config)
    config.only("mlp_bias", None, False)
    bias = config.flag("attention_bias")
    attention = gqa(config, qkv_bias=bias, o_bias=bias)
    ffns = listed_dense(config, experts(config, topk_router(config)))
    return llama(config, [LayerSpec(attention, ffn) for ffn in ffns])
