"""Mixers by the type of their spec: each mixer lists its configuration here."""

from ane_moe.model.attention import AttentionConfig, SharedAttentionConfig
from ane_moe.model.band import BandConfig
from ane_moe.model.cca import CcaConfig, CcaSpec
from ane_moe.model.delta_net import DeltaNetConfig, DeltaNetSpec
from ane_moe.model.kda import KdaConfig, KdaSpec
from ane_moe.model.lightning import LightningConfig, LightningSpec
from ane_moe.model.mamba import MambaConfig, MambaSpec
from ane_moe.model.mamba2 import Mamba2Config, Mamba2Spec
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.mla import MlaConfig, MlaSpec
from ane_moe.model.moa import MoaConfig, MoaSpec
from ane_moe.model.short_conv import ShortConvConfig, ShortConvSpec
from ane_moe.model.spec import BandSpec, GqaSpec, SharedGqaSpec

CONFIGS: dict[type, type[MixerConfig]] = {
    GqaSpec: AttentionConfig,
    SharedGqaSpec: SharedAttentionConfig,
    BandSpec: BandConfig,
    CcaSpec: CcaConfig,
    ShortConvSpec: ShortConvConfig,
    MlaSpec: MlaConfig,
    MoaSpec: MoaConfig,
    DeltaNetSpec: DeltaNetConfig,
    KdaSpec: KdaConfig,
    LightningSpec: LightningConfig,
    Mamba2Spec: Mamba2Config,
    MambaSpec: MambaConfig,
}


def mixer_config(spec: object) -> type[MixerConfig]:
    """The configuration of the part that computes a mixer."""
    return CONFIGS[type(spec)]
