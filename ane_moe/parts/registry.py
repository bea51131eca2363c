"""Mixers by the type of their configuration: each part file of a mixer lists itself here."""

from ane_moe.model.attention import AttentionConfig, RingConfig, SharedAttentionConfig
from ane_moe.model.band import BandConfig
from ane_moe.model.cca import CcaConfig
from ane_moe.model.delta_net import DeltaNetConfig
from ane_moe.model.kda import KdaConfig
from ane_moe.model.lightning import LightningConfig
from ane_moe.model.mamba import MambaConfig
from ane_moe.model.mamba2 import Mamba2Config
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.mla import MlaConfig
from ane_moe.model.moa import MoaConfig
from ane_moe.model.short_conv import ShortConvConfig
from ane_moe.parts.attention import Attention, SharedAttention
from ane_moe.parts.band import BandAttention
from ane_moe.parts.cca import Cca
from ane_moe.parts.delta_net import DeltaNet
from ane_moe.parts.kda import Kda
from ane_moe.parts.lightning import Lightning
from ane_moe.parts.mamba import Mamba
from ane_moe.parts.mamba2 import Mamba2
from ane_moe.parts.mixer import Mixer
from ane_moe.parts.mla import Mla
from ane_moe.parts.moa import Moa
from ane_moe.parts.short_conv import ShortConv

MIXERS: dict[type[MixerConfig], type[Mixer]] = {
    AttentionConfig: Attention,
    SharedAttentionConfig: SharedAttention,
    RingConfig: Attention,
    BandConfig: BandAttention,
    CcaConfig: Cca,
    ShortConvConfig: ShortConv,
    MlaConfig: Mla,
    MoaConfig: Moa,
    DeltaNetConfig: DeltaNet,
    KdaConfig: Kda,
    LightningConfig: Lightning,
    Mamba2Config: Mamba2,
    MambaConfig: Mamba,
}


def make_mixer(config: MixerConfig) -> Mixer:
    """The part that computes a mixer."""
    return MIXERS[type(config)](config)
