"""From a block's configuration to the block, and what makes the graphs of two blocks differ."""

from dataclasses import dataclass

import torch

from ane_moe.parts.block import Block, PartConfig
from ane_moe.parts.experts import ExpertGroup, ExpertGroupConfig, SharedExpert, SharedExpertConfig
from ane_moe.parts.head import Head, HeadConfig
from ane_moe.parts.mixer import MixerConfig
from ane_moe.parts.mlp import Dense, DenseConfig
from ane_moe.parts.moe import Moe, MoeConfig
from ane_moe.parts.registry import make_mixer
from ane_moe.parts.routed import RoutedMixer, RoutedMixerConfig
from ane_moe.parts.stack import Stack, StackConfig

# Blocks that are no mixers.
BLOCKS: dict[type, type[Block]] = {
    RoutedMixerConfig: RoutedMixer,
    MoeConfig: Moe,
    DenseConfig: Dense,
    StackConfig: Stack,
    ExpertGroupConfig: ExpertGroup,
    SharedExpertConfig: SharedExpert,
    HeadConfig: Head,
}


@dataclass(frozen=True)
class TemplateKey:
    """What makes a graph distinct: the block, its functions as (name, tokens), and the axis order
    of its streams."""

    block: PartConfig
    functions: tuple[tuple[str, int], ...]
    layout: str = "bc1s"


def function_name(prefix: str, name: str) -> str:
    """What a package that holds a graph more than once calls the function `name` of the copy
    `prefix`."""
    return f"{prefix}_{name}" if prefix else name


def weight_name(prefix: str, name: str) -> str:
    """What tells the weight `name` of the copy `prefix` from those of other copies."""
    return f"{prefix}/{name}" if prefix else name


def build_unbound(config: PartConfig) -> Block:
    """The block with parameters that take no memory (meta device)."""
    with torch.device("meta"):
        if isinstance(config, MixerConfig):
            return make_mixer(config)
        return BLOCKS[type(config)](config)
