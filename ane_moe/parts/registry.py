"""Mixers by the type of their spec: each part file of a mixer lists itself here."""

from ane_moe.model.cca import CcaSpec
from ane_moe.model.short_conv import ShortConvSpec
from ane_moe.model.spec import GqaSpec
from ane_moe.parts.attention import Attention, AttentionConfig
from ane_moe.parts.cca import Cca, CcaConfig
from ane_moe.parts.mixer import Mixer, MixerConfig
from ane_moe.parts.short_conv import ShortConv, ShortConvConfig

# spec -> (configuration, module)
MIXERS: dict[type, tuple[type[MixerConfig], type[Mixer]]] = {
    GqaSpec: (AttentionConfig, Attention),
    CcaSpec: (CcaConfig, Cca),
    ShortConvSpec: (ShortConvConfig, ShortConv),
}


def mixer_config(spec: object) -> type[MixerConfig]:
    """The configuration of the part that computes a mixer."""
    return MIXERS[type(spec)][0]


def make_mixer(config: MixerConfig) -> Mixer:
    """The part that computes a mixer."""
    return MIXERS[type(config.mixer)][1](config)
