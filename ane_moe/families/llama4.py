"""Llama 4 (Llama-4-Scout-17B-16E, Llama-4-Maverick-17B-128E), its language model."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.llama4_text import KEYS as KEYS
from ane_moe.families.llama4_text import TAPS as TEXT
from ane_moe.families.llama4_text import spec as text_spec
from ane_moe.model.spec import ModelSpec

TAPS = replace(TEXT, inside="text_config")


def spec(config: Config) -> ModelSpec:
    return text_spec(text_config(config))
