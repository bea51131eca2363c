"""From a block's configuration to the block."""

import torch

from ane_moe.model.experts import ExpertGroupConfig, GivenExpertConfig, SharedExpertConfig
from ane_moe.model.head import HeadConfig
from ane_moe.model.join import JoinConfig
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.mlp import DenseConfig
from ane_moe.model.moe import MoeConfig
from ane_moe.model.part import PartConfig
from ane_moe.model.routed import RoutedMixerConfig, RoutingConfig
from ane_moe.model.stack import PackedConfig, StackConfig
from ane_moe.parts.block import Block
from ane_moe.parts.experts import ExpertGroup, GivenExpert, SharedExpert
from ane_moe.parts.head import Head
from ane_moe.parts.join import Join
from ane_moe.parts.mlp import Dense
from ane_moe.parts.moe import Moe
from ane_moe.parts.registry import make_mixer
from ane_moe.parts.routed import RoutedMixer, RoutingAlone
from ane_moe.parts.stack import Packed, Stack

# Blocks that are no mixers.
BLOCKS: dict[type, type[Block]] = {
    RoutedMixerConfig: RoutedMixer,
    RoutingConfig: RoutingAlone,
    MoeConfig: Moe,
    DenseConfig: Dense,
    StackConfig: Stack,
    PackedConfig: Packed,
    ExpertGroupConfig: ExpertGroup,
    GivenExpertConfig: GivenExpert,
    SharedExpertConfig: SharedExpert,
    HeadConfig: Head,
    JoinConfig: Join,
}


def build_unbound(config: PartConfig) -> Block:
    """The block with parameters that take no memory (meta device)."""
    with torch.device("meta"):
        if isinstance(config, MixerConfig):
            return make_mixer(config)
        return BLOCKS[type(config)](config)
