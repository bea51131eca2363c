"""Granite MoE with an expert that every token passes, beside the others."""

from ane_moe.families import granitemoe as granite
from ane_moe.families.config import Config
from ane_moe.families.decoder import full_attention, llama, mlp, n_layers
from ane_moe.families.keys import LAYER, KeyTable, chunks
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec, SharedSpec

KEYS: KeyTable = {
    **granite.KEYS,
    **chunks("gate up", "ffn.shared", "shared_mlp.input_linear.weight"),
    "layers.{layer}.ffn.shared.down.weight": (f"{LAYER}.shared_mlp.output_linear.weight",),
}
TAPS = Taps(shared="shared_mlp", gate_up="input_linear", down="output_linear")


def spec(config: Config) -> ModelSpec:
    full_attention(config)
    mixers = [granite.attention(config)] * n_layers(config)
    return llama(config, granite.layers(config, mixers, shared(config)), **granite.scales(config))


def shared(config: Config) -> SharedSpec | None:
    """The expert beside the others; a width of 0 stands for none."""
    if not config.integer("shared_intermediate_size", at_least=0):
        return None
    return SharedSpec(mlp(config, "shared_intermediate_size"))
