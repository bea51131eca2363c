"""A model whose matrices are read at two bits while it is trained. Used by train_qat.py, beside
which it lies.

The rounding is that of Apple's on-device model (its 2025 foundation model report), with a scale of
each row: `W~ = s (clamp(round(W / s + 0.5), -1, 2) - 0.5)`, `s = clip * max |W| / 2`. Rounding lets
the gradient through (straight-through), and the clip is learned.
"""

import re

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ane_moe.formats.two_levels import two_level_scale

ROUTER = re.compile(r"\.(gate|routers?)\.")  # which conversions never compress
ZERO, LOWEST, HIGHEST = 0.5, -1, 2
LEAST_SCALE = 2.0**-13  # half of it is no subnormal number of fp16


class TwoBitModel(nn.Module):
    """A model that is called with its matrices at two bits; what is trained are the numbers behind
    them, and the clips."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.names = [*_compressed(model)]
        matrices = dict(model.named_parameters())
        self.clips = nn.ParameterList([_first_clip(matrices[name]) for name in self.names])

    def forward(self, ids: Tensor) -> Tensor:
        read = {name: levels * scale for name, (levels, scale) in self.rounded().items()}
        return functional_call(
            self.model, read, kwargs={"input_ids": ids, "use_cache": False}
        ).logits

    def rounded(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Levels and scales `(..., rows, 1)` of each matrix `(..., rows, columns)`."""
        matrices = dict(self.model.named_parameters())
        return {
            name: _rounded(matrices[name], clip)
            for name, clip in zip(self.names, self.clips, strict=True)
        }

    @torch.no_grad()
    def snapped(self) -> PreTrainedModel:
        """The model, its matrices in the very numbers that a package expands to."""
        for name, (levels, scale) in self.rounded().items():
            self.model.get_parameter(name).copy_((levels * scale.half().float()).half())
        return self.model


def _compressed(model: PreTrainedModel) -> list[str]:
    """Names of the matrices that `apple2` compresses: without the table of the embedding, unless
    it is the head's too."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and not ROUTER.search(name)
        and (parameter is not table or table is head)
    ]


def _first_clip(weight: Tensor) -> nn.Parameter:
    """`s * HIGHEST / max |W|` of each row for the scale of least squares."""
    rows = weight.detach().flatten(0, -2)
    scale = torch.from_numpy(two_level_scale(rows.numpy(), torch.ones(rows.shape[1]).numpy()))
    clip = scale.float()[:, None] * HIGHEST / _largest(rows)
    return nn.Parameter(clip.view(*weight.shape[:-1], 1))


def _largest(weight: Tensor) -> Tensor:
    return weight.detach().abs().amax(-1, keepdim=True).clamp(min=LEAST_SCALE)


def _rounded(weight: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Levels, whose gradient is that of numbers not yet rounded, and scales."""
    scale = (clip * _largest(weight) / HIGHEST).clamp(min=LEAST_SCALE)
    place = (weight / scale + ZERO).clamp(LOWEST, HIGHEST)
    rounded = place.detach().round()
    return rounded + (place - place.detach()) - ZERO, scale  # what is in brackets is 0
