"""Attention and routing in one call: what the host needs to dispatch a layer's experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ane_moe.model.port import FFN_INPUT, Port, Ports
from ane_moe.model.spec import RouterSpec
from ane_moe.model.weight import Row, Weight
from ane_moe.parts.attention import Attention, AttentionConfig
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.router import Router


@dataclass(frozen=True)
class RoutedAttentionConfig:
    attention: AttentionConfig
    router: RouterSpec

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield from (row.under("attn") for row in self.attention.rows())
        yield Weight("ffn.norm.weight", (self.attention.d_model,))
        yield from (row.under("ffn.router") for row in self.router.rows(self.attention.d_model))

    def ports(self, tokens: int) -> Ports:
        ports = self.attention.ports(tokens)
        normed = Port("ffn_input", (1, self.attention.d_model, 1, tokens), FFN_INPUT)
        gates = Port("gates", (1, self.router.experts, 1, tokens), "gates.{0}")
        return replace(ports, outputs=(*ports.outputs, normed, gates))


class Routing(nn.Module):
    """`(1, d, 1, T) -> (1, d, 1, T), (1, E, 1, T)`: the normed input of the experts, and their exact gates."""

    def __init__(self, config: RoutedAttentionConfig):
        super().__init__()
        self.norm = RmsNorm(config.attention.d_model, config.attention.norm.eps)
        self.router = Router(config.attention.d_model, config.router)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return h, self.router(h)


class RoutedAttention(Block):
    """`y = x + attention(norm(x))`, and the feed-forward norm and router on `y`."""

    config: RoutedAttentionConfig

    def __init__(self, config: RoutedAttentionConfig):
        super().__init__()
        self.config = config
        self.attn = Attention(config.attention)
        self.ffn = Routing(config)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.attn(**inputs)
        ffn_input, gates = self.ffn(outputs["y"])
        return outputs | {"ffn_input": ffn_input, "gates": gates}
