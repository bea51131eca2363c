"""Qwen3.5-MoE's language model alone: Qwen3-Next's layer, with matrices of its own for all that a
delta net reads."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import n_layers, router
from ane_moe.families.keys import KeyTable, Runs
from ane_moe.families.qwen3_next import DELTA_KEYS, NET, delta_model, experts
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec

PARTS = {"query": "queries", "key": "keys", "value": "values"}
KEYS: KeyTable = {
    **DELTA_KEYS,
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (
            Runs(f"{NET}.in_proj_qkv.weight", tuple(PARTS.values()), part),
        )
        for ours, part in PARTS.items()
    },
    **{
        f"layers.{{layer}}.attn.{ours}.weight": (f"{NET}.in_proj_{theirs}.weight",)
        for ours, theirs in (("z", "z"), ("beta", "b"), ("decay", "a"))
    },
}
TAPS = Taps()


def spec(config: Config) -> ModelSpec:
    moe = experts(config, router(config, renorm=True))
    return delta_model(config, [moe] * n_layers(config))
