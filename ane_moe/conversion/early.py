"""Experts that attention shards guess for the host: which layers guess which, and by what matrix.

An adapter says what the hidden state of a layer will be some layers with experts later, and that
layer's router what it would choose then (`ane-moe align`). d = d_model, E = experts of a layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint, Hasher, TensorSource
from ane_moe.early_adapters import Adapter, Adapters, write_adapters
from ane_moe.errors import UserError
from ane_moe.half import narrowed
from ane_moe.model.ranking import Ranking
from ane_moe.model.spec import LayerSpec, ModelSpec, MoeSpec
from ane_moe.model.weight import WeightName
from ane_moe.wording import counted

FILE_NAME = "early.npz"


@dataclass(frozen=True)
class ShiftedLogits:
    """What the `norm_bias` of a layer norm adds to the logits of the `router` after it, `[E]`."""

    router: TensorSource
    norm_bias: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.router.shape[:1]

    @property
    def tensors(self) -> tuple[TensorSource, ...]:
        """What it is made of in the checkpoint."""
        return self.router, self.norm_bias

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells it from a stored bias."""
        hasher.update(b"logits of a norm's bias")

    def value(self, checkpoint: Checkpoint, hasher: Hasher | None = None) -> np.ndarray:
        """fp16; `hasher` is fed what is read."""
        rows, bias = (
            checkpoint.read(one, hasher=hasher).astype(np.float32) for one in self.tensors
        )
        return narrowed(rows @ bias)


BiasSource = TensorSource | ShiftedLogits


@dataclass(frozen=True)
class EarlyRows:
    """A weight that scores the experts of a later layer: made of the `tensors` of its table, with
    the `adapter` (by its `digest`) before them. Experts are ranked by `ranking`, with that router's
    `bias` if any, which is a weight by itself."""

    tensors: tuple[TensorSource, ...]
    bias: BiasSource | None
    ranking: Ranking
    digest: str
    adapter: Adapter = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[0].shape

    @property
    def layer(self) -> int:
        """The one whose experts are scored."""
        layer = self.tensors[0].name.layer
        assert layer is not None
        return layer

    def feed(self, hasher: Hasher) -> None:
        """Feed `hasher` what tells its adapter from others."""
        hasher.update(self.digest.encode())

    def value(self, checkpoint: Checkpoint, hasher: Hasher | None = None) -> np.ndarray:
        """fp16 `[E,d]`; `hasher` is fed what is read. Raises UserError where fp16 does not hold
        it."""
        table = router_table(checkpoint, self.tensors, self.ranking, hasher)
        rows = self.adapter.before(table)
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
    tensors: tuple[TensorSource, ...],
    ranking: Ranking,
    hasher: Hasher | None = None,
) -> np.ndarray:
    """The tensors of a table in one, fp32 `[E,d]`. Where the norm takes out the mean of what it
    reads, so do the rows."""
    rows, *weights = (checkpoint.read(one, hasher=hasher).astype(np.float32) for one in tensors)
    for own in weights:
        rows = rows * own
    return rows - rows.mean(1, keepdims=True) if ranking.centred else rows


def table_sources(
    sources: Mapping[WeightName, TensorSource], layer: int
) -> tuple[TensorSource, ...]:
    """A layer's router, and the norm of what it reads, if it reads no stream as it is."""
    weight = WeightName(layer, "ffn", None, "router.weight")
    norms = [weight.beside(f"{name}.weight") for name in ("router_norm", "norm")]
    return sources[weight], *[sources[one] for one in norms if one in sources][:1]


def bias_source(
    sources: Mapping[WeightName, TensorSource], layer: int, ranking: Ranking
) -> BiasSource | None:
    """What a layer's router adds to scores or, where these are logits, to them; None: nothing."""
    if not ranking.bias:
        return None
    weight = WeightName(layer, "ffn", None, "router.weight")
    own = (weight.beside(f"router.{name}") for name in ("choice_bias", "bias"))
    found = next((sources[one] for one in own if one in sources), None)
    return found or ShiftedLogits(sources[weight], sources[weight.beside("norm.bias")])


def read_bias(checkpoint: Checkpoint, source: BiasSource) -> np.ndarray:
    """fp16 `[E]`."""
    if isinstance(source, ShiftedLogits):
        return source.value(checkpoint)
    return checkpoint.read(source)


def rankings(spec: ModelSpec, layers: Collection[int]) -> dict[int, Ranking]:
    """Of these layers those with experts that are ranked by one matrix and a vector: by what.
    Nothing is guessed for whole texts, nor after a gated norm."""
    if spec.is_encoder or spec.norm.gate_rank:
        return {}
    found = {n: _ranking(spec, spec.layers[n]) for n in layers}
    return {n: one for n, one in found.items() if one is not None}


def _ranking(spec: ModelSpec, layer: LayerSpec) -> Ranking | None:
    """None where no one matrix and vector rank experts: with two biases, with one inside a cap or a
    score, and where scores hang on the scale of a stream that no norm takes out."""
    own = layer.ffn.router.ranking if isinstance(layer.ffn, MoeSpec) else None
    if own is None:
        return None
    own = replace(own, before_mixer=layer.ffn_residual.parallel)
    if layer.ffn_residual.norms == "after":
        return None if own.sees_scale else own
    if spec.norm.bias and (own.sees_scale or own.softcap):
        return None
    centred = spec.norm.kind == "layer"
    return replace(own, centred=centred, bias=own.bias or spec.norm.bias)


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
    return EarlyRows(table_sources(sources, layer), bias, ranking, adapter.digest, adapter)


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
