"""GLM-4.5V, its language model: GLM-4.5's layer. Without images all three positions of a token are
one, and rotation is the usual one."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import text_config
from ane_moe.families.glm4_moe import KEYS as KEYS
from ane_moe.families.glm4_moe import TAPS as TAPS
from ane_moe.families.glm4_moe import spec as glm4_moe
from ane_moe.model.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    inner = text_config(config)
    return glm4_moe(Config(inner.values | {"use_qk_norm": False}, inner.where))
