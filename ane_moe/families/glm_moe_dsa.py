"""GLM-5: DeepSeek-V3.2's layer. Some layers take the tokens that an indexer before them chose."""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.deepseek_v32 import BESIDE as BESIDE
from ane_moe.families.deepseek_v32 import KEYS as KEYS
from ane_moe.families.deepseek_v32 import spec as deepseek_v32
from ane_moe.families.taps import DEEPSEEK
from ane_moe.model.spec import ModelSpec

TAPS = replace(DEEPSEEK, hands_on=True)


def spec(config: Config) -> ModelSpec:
    return deepseek_v32(config)
