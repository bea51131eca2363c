"""GLM-4.7-Flash: DeepSeek-V3's latent attention and router, dense layers where the file says so."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import listed_dense, sigmoid_router
from ane_moe.families.deepseek_v3 import KEYS as KEYS
from ane_moe.families.deepseek_v3 import TAPS as TAPS
from ane_moe.families.deepseek_v3 import experts, latent_model
from ane_moe.model.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    ffns = listed_dense(config, experts(config, sigmoid_router(config)), _first_dense)
    return latent_model(config, ffns, interleaved=config.flag("rope_interleave"))


def _first_dense(number: int) -> str:
    return "sparse" if number else "dense"
