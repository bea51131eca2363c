"""Kimi K2.5 (Kimi-K2.5, K2.6), its language model: DeepSeek-V3's."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.deepseek_v3 import KEYS as KEYS
from ane_moe.families.deepseek_v3 import TAPS as TAPS
from ane_moe.families.deepseek_v3 import spec as deepseek_v3
from ane_moe.model.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    return deepseek_v3(text_config(config))
