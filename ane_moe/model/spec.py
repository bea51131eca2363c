"""ModelSpec: an architecture as data, without weights.

Everything downstream (blocks, plan, convert) reads these frozen dataclasses and nothing else of a model's
configuration. Sizes are in elements; `None` means the model does not have the part. Each part lists the tensors it
needs (`rows`), in the order in which its module has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ane_moe.model.weight import EMBEDDING, HEAD, Weight, WeightName


@dataclass(frozen=True)
class NormSpec:
    """An RMS normalisation over channels."""

    eps: float = 1e-6


@dataclass(frozen=True)
class RopeSpec:
    """A rotary table as data: angles are `position * inv_freq`, cos and sin are multiplied by `attention_factor`.

    The graph form is always half-split; a family whose checkpoint pairs neighbouring channels permutes its query
    and key rows instead (exact). `len(inv_freq) * 2` channels of each head are rotated, the rest pass through.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class GqaSpec:
    """Grouped-query attention with a KV cache (multi-head attention when `kv_heads == heads`)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: str | None                                    # name of a table in ModelSpec.ropes
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"   # per head, or over the whole projected vector
    qk_norm_eps: float = 1e-6
    clip_qkv: float | None = None                       # clamps q, k and v after the norm, before RoPE
    window: int | None = None                           # tokens a query sees, itself included; None: all before it

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention, its norm first."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield Weight("norm.weight", (d_model,))
        for name, width in (("q", query), ("k", key), ("v", key)):
            yield Weight(f"{name}.weight", (width, d_model), f"attention.{name}", reads="x")
            if self.qkv_bias:
                yield Weight(f"{name}.bias", (width,))
        yield Weight("o.weight", (d_model, query), "attention.o", reads="attended", fold="residual_scale")
        if self.o_bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            yield Weight("q_norm.weight", (self.head_dim if per_head else query,))
            yield Weight("k_norm.weight", (self.head_dim if per_head else key,))


# One member per mixer block; MLA, CCA and short convolutions join with their blocks.
MixerSpec = GqaSpec


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts: `k` of `experts`, the lowest index winning ties.

    Experts are weighted by the full softmax, gathered at the k chosen (renormalised when `renorm`); softmax over only
    the k chosen logits is the same function as `renorm=True`.
    """

    experts: int
    k: int
    renorm: bool = True

    def rows(self, d_model: int) -> Iterator[Weight]:
        yield Weight("weight", (self.experts, d_model))


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: `down(silu(gate(x)) * up(x))`, `width` channels wide inside."""

    width: int

    def rows(self, d_model: int, role: str) -> Iterator[Weight]:
        """Its matrices, which a recipe calls `role`.gate, .up and .down."""
        yield Weight("gate.weight", (self.width, d_model), f"{role}.gate", reads="x")
        yield Weight("up.weight", (self.width, d_model), f"{role}.up", reads="x")
        down = f"{role}.down"
        yield Weight("down.weight", (d_model, self.width), down, reads="hidden", fold="residual_scale")


@dataclass(frozen=True)
class SharedSpec:
    """An always-on expert; `gated` multiplies it by `sigmoid(w . x)`."""

    mlp: MlpSpec
    gated: bool = False

    def rows(self, d_model: int) -> Iterator[Weight]:
        for row in self.mlp.rows(d_model, "shared"):
            yield row.under("shared")
        if self.gated:
            yield Weight("shared_gate.weight", (1, d_model))


@dataclass(frozen=True)
class MoeSpec:
    router: RouterSpec
    expert: MlpSpec
    shared: SharedSpec | None = None


FfnSpec = MlpSpec | MoeSpec


@dataclass(frozen=True)
class LayerSpec:
    mixer: MixerSpec
    ffn: FfnSpec

    def weights(self, number: int, d_model: int) -> Iterator[tuple[WeightName, Weight]]:
        """The tensors of the layer `number` of a model."""
        for row in self.mixer.rows(d_model):
            yield WeightName(number, "attn", None, row.path), row
        yield WeightName(number, "ffn", None, "norm.weight"), Weight("norm.weight", (d_model,))
        if isinstance(self.ffn, MlpSpec):
            for row in self.ffn.rows(d_model, "dense"):
                yield WeightName(number, "ffn", None, f"mlp.{row.path}"), row.under("mlp")
            return
        for row in self.ffn.router.rows(d_model):
            yield WeightName(number, "ffn", None, f"router.{row.path}"), row.under("router")
        expert_rows = tuple(self.ffn.expert.rows(d_model, "experts"))
        for expert in range(self.ffn.router.experts):
            for row in expert_rows:
                yield WeightName(number, "ffn", expert, row.path), row
        if self.ffn.shared is not None:
            for row in self.ffn.shared.rows(d_model):
                yield WeightName(number, "ffn", None, row.path), row


@dataclass(frozen=True)
class HeadSpec:
    """Final norm and vocabulary projection; logits are multiplied by `logit_scale`."""

    tied: bool
    logit_scale: float = 1.0

    def rows(self, vocab: int, d_model: int) -> Iterator[Weight]:
        """The logit scale goes into the norm: the other weight may be the embedding's."""
        yield Weight("norm.weight", (d_model,), fold="logit_scale")
        yield Weight(HEAD.path, (vocab, d_model), "head", reads="x")


@dataclass(frozen=True)
class ModelSpec:
    """One model. Every layer is `x += residual_scale * mixer(norm(x)); x += residual_scale * ffn(norm(x))`."""

    family: str
    d_model: int
    vocab: int
    context: int                        # the model's own limit, in tokens
    norm: NormSpec
    layers: tuple[LayerSpec, ...]
    head: HeadSpec
    ropes: dict[str, RopeSpec]
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def weights(self) -> Iterator[tuple[WeightName, Weight]]:
        """Every tensor the model needs, in the order of the layers."""
        table = Weight(EMBEDDING.path, (self.vocab, self.d_model), "embedding", fold="embed_scale")
        yield EMBEDDING, table
        for number, layer in enumerate(self.layers):
            yield from layer.weights(number, self.d_model)
        for row in self.head.rows(self.vocab, self.d_model):
            yield WeightName(None, HEAD.part, None, row.path), row

    def multiplier(self, fold: str) -> float:
        """The multiplier that a row asks for with `fold`; 1 where it asks for none."""
        multipliers = {
            "embed_scale": self.embed_scale,
            "residual_scale": self.residual_scale,
            "logit_scale": self.head.logit_scale,
        }
        return multipliers[fold] if fold else 1.0
