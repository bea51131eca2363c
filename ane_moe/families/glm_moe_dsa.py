"""GLM-5: DeepSeek-V3.2's layer, whose indexers are rotated in pairs of neighbours. Some layers may
take the tokens that an indexer before them chose; of these a context has no more than are chosen.
"""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.deepseek_v32 import BESIDE as BESIDE
from ane_moe.families.deepseek_v32 import KEYS as DEEPSEEK_V32
from ane_moe.families.deepseek_v32 import PAIRED_INDEX_KEYS, indexed_model, indexer, within
from ane_moe.families.keys import KeyTable
from ane_moe.families.taps import DEEPSEEK
from ane_moe.model.spec import ModelSpec

TAPS = replace(DEEPSEEK, hands_on=True)
KEYS: KeyTable = {**DEEPSEEK_V32, **PAIRED_INDEX_KEYS}


def spec(config: Config) -> ModelSpec:
    if set(config.strings("indexer_types")) - {"full"}:
        return indexed_model(within(config, config.integer("index_topk")), None)
    return indexed_model(config, indexer(config, interleaved=True))
