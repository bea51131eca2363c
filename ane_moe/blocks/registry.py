"""From a block's configuration to the block, and what makes the graphs of two blocks differ."""

from dataclasses import dataclass

import torch

from ane_moe.blocks.attention import Attention, AttentionConfig
from ane_moe.blocks.head import Head, HeadConfig
from ane_moe.blocks.mlp import Dense, DenseConfig
from ane_moe.blocks.moe import Moe, MoeConfig
from ane_moe.blocks.ports import Block

BlockConfig = AttentionConfig | MoeConfig | DenseConfig | HeadConfig

BLOCKS: dict[type, type[Block]] = {
    AttentionConfig: Attention,
    MoeConfig: Moe,
    DenseConfig: Dense,
    HeadConfig: Head,
}


@dataclass(frozen=True)
class TemplateKey:
    """What makes a graph distinct: the block, its functions as (name, tokens), and the axis order of its streams."""

    block: BlockConfig
    functions: tuple[tuple[str, int], ...]
    layout: str = "bc1s"


def build_unbound(config: BlockConfig) -> Block:
    """The block with parameters that take no memory (meta device); caches are real."""
    with torch.device("meta"):
        block = BLOCKS[type(config)](config)
    for name, buffer in list(block.named_buffers()):
        block.register_buffer(name, torch.zeros(buffer.shape))
    return block
