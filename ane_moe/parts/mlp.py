"""Gated MLPs: dense layers, experts and shared experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ane_moe.model.port import STREAM, Port, Ports
from ane_moe.model.spec import MlpSpec, NormSpec, residual_rows
from ane_moe.model.weight import Row, Weight, with_directions
from ane_moe.parts.block import Block
from ane_moe.parts.norm import RmsNorm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import residual

MlpRanks = tuple[int, int, int]  # directions kept apart from gate, up and down


def mlp_rows(mlp: MlpSpec, d_model: int, role: str, ranks: MlpRanks) -> Iterator[Row]:
    """The parameters of a GatedMlp, in its own order."""
    by_matrix = dict(zip(("gate", "up", "down"), ranks, strict=True))
    return with_directions(mlp.rows(d_model, role), by_matrix)


class GatedMlp(nn.Module):
    """`down(scale * silu(gate(x)) * up(x))`: `(1, d, 1, T) -> (1, d, 1, T)`, scale `(1, 1, 1, T)`
    or none.

    silu is written out: the engine's own `silu` is off by about 1e-3 near zero, and Apple's
    model-authoring rules ask for `gate * sigmoid(gate)`; in just that order coremltools fuses the
    two back into `silu`, so `up` comes between. The scale (an expert's gate) acts before `down`, on
    fewer channels and smaller values.
    """

    def __init__(self, d_model: int, spec: MlpSpec, ranks: MlpRanks = (0, 0, 0)):
        super().__init__()
        self.gate = Projection(d_model, spec.width, rank=ranks[0])
        self.up = Projection(d_model, spec.width, rank=ranks[1])
        self.down = Projection(spec.width, d_model, rank=ranks[2])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        gate = self.gate(x)
        hidden = torch.sigmoid(gate) * self.up(x) * gate  # (1, I, 1, T)
        return self.down(hidden if scale is None else hidden * scale)


@dataclass(frozen=True)
class DenseConfig:
    d_model: int
    norm: NormSpec
    mlp: MlpSpec
    ranks: MlpRanks = (0, 0, 0)
    affine: bool = False

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield Weight("norm.weight", (self.d_model,))
        for row in mlp_rows(self.mlp, self.d_model, "dense", self.ranks):
            yield row.under("mlp")
        if self.affine:
            yield from residual_rows(self.d_model)

    def ports(self, tokens: int) -> Ports:
        stream = Port("x", (1, self.d_model, 1, tokens), STREAM)
        return Ports((stream,), (replace(stream, name="y"),))


class Dense(Block):
    """`y = x + mlp(norm(x))`: the feed-forward part of a layer without experts."""

    config: DenseConfig

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.config = config
        self.norm = RmsNorm(config.d_model, config.norm.eps)
        self.mlp = GatedMlp(config.d_model, config.mlp, config.ranks)
        self.residual = residual(config.d_model, config.affine)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"y": self.residual(x, self.mlp(self.norm(x)))}
