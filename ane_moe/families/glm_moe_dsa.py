"""GLM-5: DeepSeek-V3.2's layer, whose indexers are rotated in pairs of neighbours. Some layers may
take the tokens that an indexer before them chose; of these a context has no more than are chosen.
"""

from dataclasses import replace

from ane_moe.families.config import Config
from ane_moe.families.deepseek_v32 import BESIDE as BESIDE
from ane_moe.families.deepseek_v32 import KEYS as DEEPSEEK_V32
from ane_moe.families.deepseek_v32 import PAIRED_INDEX_KEYS
from ane_moe.families.deepseek_v32 import spec as deepseek_v32
from ane_moe.families.keys import KeyTable
from ane_moe.families.taps import DEEPSEEK
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import LayerSpec, ModelSpec

TAPS = replace(DEEPSEEK, hands_on=True)
KEYS: KeyTable = {**DEEPSEEK_V32, **PAIRED_INDEX_KEYS}


def spec(config: Config) -> ModelSpec:
    whole = deepseek_v32(config)
    if set(config.strings("indexer_types")) - {"full"}:
        limit = min(whole.context, config.integer("index_topk"))
        layers = tuple(map(_without, whole.layers))
        return replace(whole, context=limit, layers=layers)
    return replace(whole, layers=tuple(map(_in_pairs, whole.layers)))


def _without(layer: LayerSpec) -> LayerSpec:
    assert isinstance(layer.mixer, MlaSpec)
    return replace(layer, mixer=replace(layer.mixer, indexer=None))


def _in_pairs(layer: LayerSpec) -> LayerSpec:
    mixer = layer.mixer
    assert isinstance(mixer, MlaSpec) and mixer.indexer
    return replace(layer, mixer=replace(mixer, indexer=replace(mixer.indexer, interleaved=True)))
