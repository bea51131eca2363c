"""Experts that attention shards guess for the host: which layers guess which, and by what matrix.

An adapter says what the hidden state of a layer will be some layers with experts later, and that
layer's router what it would choose then (`ane-moe align`). d = d_model, E = experts of a layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, Hasher, TensorSource
from ane_moe.early_adapters import Adapter, Adapters, write_adapters
from ane_moe.errors import UserError
from ane_moe.half import narrowed
from ane_moe.model.ranking import Ranking
from ane_moe.model.spec import ModelSpec, MoeSpec
from ane_moe.model.weight import WeightName
from ane_moe.wording import counted

FILE_NAME = "early.npz"


@dataclass(frozen=True)
class EarlyRows:
    """A weight that scores the experts of a later layer: its `router` with the weights of the
    `norm` before it, and the `adapter` (by its `digest`) before both. Experts are ranked by
    `ranking`, with that router's `bias` if any, which is a weight by itself."""

    router: TensorSource
    norm: TensorSource
    bias: TensorSource | None
    ranking: Ranking
    digest: str
    adapter: Adapter = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.router.shape

    @property
    def layer(self) -> int:
        """The one whose experts are scored."""
        assert self.router.name.layer is not None
        return self.router.name.layer

    @property
    def tensors(self) -> tuple[TensorSource, TensorSource]:
        """What the matrix is made of in the checkpoint."""
        return self.router, self.norm

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells its adapter from others."""
        hasher.update(self.digest.encode())

    def value(self, checkpoint: Checkpoint, hasher: Hasher | None = None) -> np.ndarray:
        """fp16 `[E,d]`; `hasher` is fed what is read. Raises UserError where fp16 does not hold
        it."""
        rows = self.adapter.before(router_table(checkpoint, *self.tensors, hasher))
        half = narrowed(rows)
        if not np.isfinite(half).all():
            raise UserError(
                f"the router of layer {self.layer} overflows fp16 with its adapter",
                f"{np.abs(rows).max():g}",
                "leave --early out",
            )
        return half


def router_table(
    checkpoint: Checkpoint,
    router: TensorSource,
    norm: TensorSource,
    hasher: Hasher | None = None,
) -> np.ndarray:
    """A router with the weights of the norm before it folded in, fp32 `[E,d]`."""
    rows, weights = (
        checkpoint.read(one, hasher=hasher).astype(np.float32) for one in (router, norm)
    )
    return rows * weights


def table_sources(
    sources: Mapping[WeightName, TensorSource], layer: int
) -> tuple[TensorSource, TensorSource]:
    """A layer's router, and the norm of what it reads."""
    weight = WeightName(layer, "ffn", None, "router.weight")
    own = weight.beside("router_norm.weight")
    return sources[weight], sources[own if own in sources else weight.beside("norm.weight")]


def bias_source(
    sources: Mapping[WeightName, TensorSource], layer: int, ranking: Ranking
) -> TensorSource | None:
    """What a layer's router adds to scores or, where these are logits, to them; None: nothing."""
    if not ranking.bias:
        return None
    chosen = WeightName(layer, "ffn", None, "router.choice_bias")
    return sources[chosen if chosen in sources else chosen.beside("router.bias")]


def rankings(spec: ModelSpec, layers: Collection[int]) -> dict[int, Ranking]:
    """Of these layers those with experts that are ranked by one matrix and a vector, after a norm
    by the root of the mean square: by what. Nothing is guessed for whole texts."""
    if spec.is_encoder or spec.norm.kind != "rms" or spec.norm.gate_rank:
        return {}
    ffns = {n: spec.layers[n].ffn for n in layers}
    ranked = {n: ffn.router.ranking for n, ffn in ffns.items() if isinstance(ffn, MoeSpec)}
    normed = {n for n in ranked if spec.layers[n].ffn_residual.norms != "after"}
    return {n: one for n, one in ranked.items() if one is not None and n in normed}


def early_rows(
    spec: ModelSpec,
    sources: Mapping[WeightName, TensorSource],
    adapters: Adapters,
    ahead: int,
    layers: Collection[int],
) -> dict[int, EarlyRows]:
    """By layer, of those that are converted, what it scores `ahead` layers with experts later.

    Raises UserError for adapters of another model or of other distances, and where no layer has
    experts to guess.
    """
    meant = _meant(spec, ahead)
    fitted = _fitted(adapters, ahead, meant)
    known = rankings(spec, layers)
    pairs = {n: other for n, other in meant.items() if n in layers and other in known}
    if not pairs:
        what = f"no experts {counted(ahead, 'layer')} ahead are converted"
        raise _not_guessed(what, f"layers {sorted(layers)} alone")
    return {n: _rows(sources, other, known[other], fitted[n]) for n, other in pairs.items()}


def _rows(
    sources: Mapping[WeightName, TensorSource], layer: int, ranking: Ranking, adapter: Adapter
) -> EarlyRows:
    bias = bias_source(sources, layer, ranking)
    return EarlyRows(*table_sources(sources, layer), bias, ranking, adapter.digest, adapter)


def _meant(spec: ModelSpec, ahead: int) -> dict[int, int]:
    """Of the whole model: each layer with experts, and the one that lies so far `ahead`."""
    routed = [n for n, layer in enumerate(spec.layers) if isinstance(layer.ffn, MoeSpec)]
    if spec.tracks is not None or not rankings(spec, routed):
        why = "their tracks have no hidden state in common" if spec.tracks else "by no one matrix"
        raise _not_guessed(f"experts of {spec.family} are not guessed by shards", why)
    if not 1 <= ahead < len(routed):
        what = f"there are no experts {counted(ahead, 'layer')} ahead"
        raise _not_guessed(what, f"{counted(len(routed), 'layer')} with experts")
    return dict(zip(routed, routed[ahead:], strict=False))


def _fitted(adapters: Adapters, ahead: int, meant: Mapping[int, int]) -> dict[int, Adapter]:
    """The adapters of this distance, by layer: those of all layers that are `meant`."""
    fitted = {layer: one for (layer, far), one in adapters.ahead.items() if far == ahead}
    if not fitted:
        raise UserError(
            f"there are no adapters for experts {counted(ahead, 'layer')} ahead",
            f"for {sorted({far for _, far in adapters.ahead})}",
            "give another --ahead, or fit them with `ane-moe align --distances`",
        )
    if fitted.keys() != meant.keys():
        found = f"of layers {sorted(fitted)}, not {sorted(meant)}"
        raise UserError("the adapters are of another model", found, "fit them with `ane-moe align`")
    return fitted


def _not_guessed(what: str, found: str) -> UserError:
    return UserError(what, found, "leave --early out")


def write_early(rows: Mapping[int, EarlyRows], facts: tuple[int, int], out: Path) -> str | None:
    """Keep the adapters that shards have taken up, for hosts that guess by themselves and for
    whoever compares; `facts`: d, and how many layers ahead. Returns the file's name below `out`,
    None where there are none."""
    d_model, ahead = facts
    if not rows:
        (out / FILE_NAME).unlink(missing_ok=True)
        return None
    used = {(layer, ahead): one.adapter for layer, one in rows.items()}
    write_adapters(Adapters(d_model, used), out / FILE_NAME)
    return FILE_NAME
