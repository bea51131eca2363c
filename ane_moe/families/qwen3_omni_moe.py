"""Qwen3-Omni (Qwen3-Omni-30B-A3B), the language model of its thinker: Qwen3-MoE's layer. Without
images and sound all three positions of a token are one, and rotation is the usual one."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.qwen3_moe import KEYS as KEYS
from ane_moe.families.qwen3_moe import spec as qwen3_moe
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec

TAPS = Taps(inside="thinker_config")


def spec(config: Config) -> ModelSpec:
    thinker = config.values.get("thinker_config")
    if not isinstance(thinker, dict):
        raise config.wrong("thinker_config", "an object")
    outer = ("model_type", "bos_token_id", "eos_token_id")
    own = {name: config.values[name] for name in outer if config.has(name)}
    inner = text_config(Config(thinker | own, config.where))
    inner.only("sliding_window", None)
    return qwen3_moe(Config(inner.values | {"use_sliding_window": False}, inner.where))
