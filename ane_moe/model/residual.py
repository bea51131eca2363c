"""How a half of a layer reads the stream and adds to it, as data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ane_moe.model.norm import NormSpec
from ane_moe.model.weight import Weight

STREAM_SCALE = "stream_scale"  # the fold of what is shifted into the stream
# Where the norms of a layer's halves stand: before what reads the stream, after what is added to
# it, or both.
Norms = Literal["before", "after", "around"]


@dataclass(frozen=True)
class ResidualSpec:
    """`norms`: where those of the half stand. `keeps`: it adds to so many times the normed stream
    that it reads, in place of the stream. `affine`: what it adds, and the stream itself, are each
    shifted and scaled by channel. `parallel`: both halves read the stream as it enters the layer;
    what the mixer adds the feed-forward block adds with its own. `scaled`: where there is a norm
    after, the stream is multiplied by a number in the end. `nth`: where there is one, this is the
    n-th addition to the stream, `sqrt((n-1) / n) * stream + sqrt(1 / n) * added`. What the half
    `hands_on` it does not add: a later one does, which `takes` it."""

    norms: Norms = "before"
    keeps: float | None = None
    affine: bool = False
    parallel: bool = False
    scaled: bool = False
    nth: int | None = None
    hands_on: bool = False
    takes: bool = False

    def read_rows(self, norm: NormSpec, d_model: int) -> Iterator[Weight]:
        """The norm of what the half reads."""
        if self.norms != "after":
            yield from norm.rows(d_model)

    def added_rows(self, norm: NormSpec, d_model: int) -> Iterator[Weight]:
        """The norm of what it adds, and the vectors and numbers of the meeting."""
        if self.norms != "before":
            if self.scaled:
                yield Weight("residual.scale", (1,))
            yield from norm.rows(d_model, STREAM_SCALE, "residual.after")
        if self.affine:
            yield from affine_rows(d_model)


PLAIN = ResidualSpec()


def affine_rows(d_model: int) -> Iterator[Weight]:
    """The vectors of an affine residual: `(added + bias) * scale + (stream + bias) * scale`."""
    for name in ("added_scale", "added_bias", "stream_bias", "stream_scale"):
        fold = STREAM_SCALE if name.endswith("bias") else ""
        yield Weight(f"residual.{name}", (d_model,), fold=fold)


def added_scale_row(d_model: int) -> Weight:
    """What an affine residual multiplies by what is added on its own."""
    return next(row for row in affine_rows(d_model) if row.path.endswith("added_scale"))
