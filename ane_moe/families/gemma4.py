"""Gemma 4 (gemma-4-26B-A4B), its language model."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.gemma4_text import KEYS as KEYS
from ane_moe.families.gemma4_text import TAPS as TAPS
from ane_moe.families.gemma4_text import spec as text_spec
from ane_moe.model.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    return text_spec(text_config(config))
