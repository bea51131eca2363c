"""Qwen3.5-MoE (Qwen3.5-35B-A3B), its language model: gated delta nets with gated attention between
them. Without images all three positions of a token are one, and rotation is the usual one."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.keys import KeyTable
from ane_moe.families.qwen3_5_moe_text import KEYS as TEXT
from ane_moe.families.qwen3_5_moe_text import spec as text_spec
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec

KEYS: KeyTable = TEXT
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    return text_spec(text_config(config))
