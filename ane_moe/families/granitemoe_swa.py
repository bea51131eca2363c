"""Granite MoE with windows and sinks (granite-swash-3b-a600m): three layers of four see a window,
each layer has a rotary base of its own, or none."""

from ane_moe.families import granitemoe as granite
from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, SLIDING, decoder, layer_windows, n_layers, rope_table
from ane_moe.families.granitemoeshared import KEYS as SHARED
from ane_moe.families.granitemoeshared import TAPS as TAPS
from ane_moe.families.granitemoeshared import shared
from ane_moe.families.keys import LAYER, KeyTable
from ane_moe.families.rope import rope_config
from ane_moe.model.spec import ModelSpec, RopeSpec

# Only the newer of Granite's names: transformers gives the older ones to no tensor of this model.
KEYS: KeyTable = {
    **{ours: entries[-1:] for ours, entries in SHARED.items()},
    "layers.{layer}.attn.sinks.weight": (f"{LAYER}.self_attn.sinks",),
}


def spec(config: Config) -> ModelSpec:
    bases = _bases(config)
    names = {base: f"base_{place}" for place, base in enumerate(sorted({*bases} - {0.0}))}
    mixers = [
        granite.attention(config, sinks=True, window=window, rope=names.get(base))
        for window, base in zip(layer_windows(config, _every_fourth_full), bases, strict=True)
    ]
    ropes = {name: _table(config, base, mixers[0].head_dim) for base, name in names.items()}
    layers = granite.layers(config, mixers, shared(config))
    return decoder(config, layers, ropes=ropes, **granite.scales(config))


def _every_fourth_full(number: int) -> str:
    return SLIDING if number % 4 else FULL


def _bases(config: Config) -> tuple[float, ...]:
    """The rotary base of each layer; 0 where it does not rotate."""
    count, given = n_layers(config), config.values.get("layer_rope_theta")
    if given is None:
        return (rope_config(config).number("rope_theta"),) * count
    if (
        not isinstance(given, list)
        or len(given) != count
        or not all(isinstance(base, int | float) and base >= 0 for base in given)
    ):
        raise config.wrong("layer_rope_theta", f"{count} numbers from 0 up")
    return tuple(map(float, given))


def _table(config: Config, base: float, head_dim: int) -> RopeSpec:
    rope = rope_config(config)
    rope.only("partial_rotary_factor", None, 1)
    return rope_table(Config(rope.values | {"rope_theta": base}, rope.where), head_dim)
