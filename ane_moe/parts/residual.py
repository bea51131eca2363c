"""Where what a block adds meets the stream, and the embedding becomes it."""

import torch
from torch import Tensor, nn

from ane_moe.model.norm import NormSpec
from ane_moe.model.residual import ResidualSpec
from ane_moe.parts.norm import make_norm


def vector(channels: int) -> nn.Parameter:
    """A weight by channel, as it meets a stream: `(1, C, 1, 1)`."""
    return nn.Parameter(torch.empty(1, channels, 1, 1))


class PlainResidual(nn.Module):
    """`stream + added`, each `(1, d, 1, T)`."""

    def forward(self, stream: Tensor, added: Tensor) -> Tensor:
        return stream + added

    def without(self, stream: Tensor) -> Tensor:
        """The stream where nothing is added yet."""
        return stream

    def alone(self, added: Tensor) -> Tensor:
        """What is added, for whoever has not got the stream."""
        return added


class NormedResidual(PlainResidual):
    """`stream + norm(added)`, or that times a number, or the two weighed (`ResidualSpec.nth`);
    parts of what is added are summed up before."""

    def __init__(self, d_model: int, norm: NormSpec, spec: ResidualSpec):
        super().__init__()
        self.scale = vector(1) if spec.scaled else None
        self.after, self.nth = make_norm(d_model, norm), spec.nth

    def forward(self, stream: Tensor, added: Tensor) -> Tensor:
        normed = self.after(added)
        if self.nth is not None:
            return stream * (1 - 1 / self.nth) ** 0.5 + normed * self.nth**-0.5
        whole = stream + normed
        return whole if self.scale is None else whole * self.scale


class AddedScale(PlainResidual):
    """The share of an affine residual in what is added on its own."""

    def __init__(self, d_model: int):
        super().__init__()
        self.added_scale = vector(d_model)

    def alone(self, added: Tensor) -> Tensor:
        return added * self.added_scale


class AffineResidual(AddedScale):
    """`(added + bias) * scale + (stream + bias) * scale`, by channel (`ResidualSpec.affine`)."""

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.added_bias = vector(d_model)
        self.stream_bias, self.stream_scale = vector(d_model), vector(d_model)

    def forward(self, stream: Tensor, added: Tensor) -> Tensor:
        return self._kept(stream) + (added + self.added_bias) * self.added_scale

    def without(self, stream: Tensor) -> Tensor:
        return self._kept(stream) + self.added_bias * self.added_scale

    def _kept(self, stream: Tensor) -> Tensor:
        return (stream + self.stream_bias) * self.stream_scale


def make_residual(d_model: int, norm: NormSpec, spec: ResidualSpec) -> PlainResidual:
    """The residual of a layer's half."""
    if spec.norms != "before":
        return NormedResidual(d_model, norm, spec)
    return unnormed_residual(d_model, spec)


def unnormed_residual(d_model: int, spec: ResidualSpec) -> PlainResidual:
    """That of a half whose sum is normed elsewhere, if at all."""
    return AffineResidual(d_model) if spec.affine else PlainResidual()


def residual_alone(d_model: int, affine: bool) -> PlainResidual:
    """That of a part which has not got the stream."""
    return AddedScale(d_model) if affine else PlainResidual()


class Entry(nn.Module):
    """The embedding on its way into the first layer (`LayerSpec.entry`)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.bias, self.scale = vector(d_model), vector(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias) * self.scale


def kept(stream: Tensor, normed: Tensor, keeps: float | None) -> Tensor:
    """What a layer's half adds to: the stream, or `keeps` times what it reads of it. Never that
    itself, since one value would be two outputs of a half whose experts the host calls, of which a
    program has but one."""
    if keeps is None:
        return stream
    return normed + stream * 0 if keeps == 1 else normed * keeps


def norm_before(d_model: int, norm: NormSpec, spec: ResidualSpec) -> nn.Module:
    """The norm of what a layer's half reads."""
    return nn.Identity() if spec.norms == "after" else make_norm(d_model, norm)
