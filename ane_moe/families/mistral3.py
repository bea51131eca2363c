"""Mistral 4 beside a vision tower (Mistral-Small-4-119B), its language model."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.mistral4 import KEYS as KEYS
from ane_moe.families.mistral4 import TAPS as TAPS
from ane_moe.families.mistral4 import spec as mistral4
from ane_moe.model.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    inner = config.values.get("text_config")
    if isinstance(inner, dict):  # other models have the vision tower and this name, and no experts
        Config(inner, config.where).only("model_type", "mistral4")
    return mistral4(text_config(config))
