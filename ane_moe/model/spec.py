"""ModelSpec: an architecture as data, without weights.

Everything downstream (blocks, plan, convert) reads these frozen dataclasses and nothing else of a
model's configuration. Sizes are in elements; `None` means the model does not have the part. Each
part lists the tensors it needs (`rows`), in the order in which its module has them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, TypeVar

from ane_moe.model.eda_router import EdaRouterSpec
from ane_moe.model.norm import NormSpec
from ane_moe.model.ranking import Ranking
from ane_moe.model.residual import STREAM_SCALE, Norms, ResidualSpec
from ane_moe.model.sparse_mixer import SparseMixerSpec
from ane_moe.model.weight import EMBEDDING, HEAD, HEAD_BIAS, Row, Weight, WeightName

AnyRow = TypeVar("AnyRow", Weight, Row)
# The folds of an attention's values and of a gated MLP's linear branch, and of what reads them.
VALUES, FROM_VALUES, UPS, FROM_UPS = "values", "from_values", "ups", "from_ups"
SHARED_FROM_UPS = "shared_from_ups"  # the latter of shared experts
LATENT_SCALE = "latent_scale"  # the fold of the norm that gives latents
INVERSE_ROOT = "inverse_root"  # the fold of 1 / sqrt(d_model)
FROM_SQUARES = "from_squares"  # of what reads squares of the branch
# Modules of an attention that make keys and values.
OF_KEYS_AND_VALUES = ("k", "v", "k_norm", "v_norm", "k_scale", "v_scale")


@dataclass(frozen=True)
class RopeSpec:
    """A rotary table as data: angles are `position * inv_freq`, cos and sin are multiplied by
    `attention_factor`.

    The graph form is always half-split; a family whose checkpoint pairs neighbouring channels
    permutes its query and key rows instead (exact). `len(inv_freq) * 2` channels of each head are
    rotated, the rest pass through.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Temperature:
    """Queries are multiplied by `1 + scale * log(1 + n)`, n whole runs of `steps` tokens up to and
    with their own; with `power` by `(1 + n) ** scale`, n with the part of a run begun.

    Source: transformers' `Llama4TextAttention` (arXiv 2501.19399), `BeamModel`.
    """

    steps: int
    scale: float
    power: bool = False


@dataclass(frozen=True)
class GqaSpec:
    """Grouped-query attention with a KV cache (multi-head attention when `kv_heads == heads`)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: str | None  # name of a table in ModelSpec.ropes
    qkv_bias: bool = False
    o_bias: bool = False
    # Per head, or over the whole projected vector; per head also after RoPE (HunYuan), or then
    # without weights (Llama 4).
    qk_norm: Literal["none", "head", "full", "rotated", "unit"] = "none"
    qk_norm_eps: float = 1e-6
    clip_qkv: float | None = None  # clamps q, k and v after the norm, before RoPE
    window: int | None = None  # tokens a query sees, itself included; None: all before it
    sees_prompt: bool = False  # the window is of generated tokens alone, which see all of a prompt
    chunk: int | None = None  # tokens see those before them in their own run of so many
    temperature: Temperature | None = None
    # A score for each head beside those of the keys, which takes its share and gives no value.
    sinks: bool = False
    # What is attended to is multiplied by a function of a projection of the layer's input: each
    # channel by one of its own, or each head.
    gate: Literal["none", "sigmoid", "softplus"] = "none"
    gate_by_head: bool = False
    gate_bias: bool = False  # one for each head, beside the projection
    v_norm: bool = False  # values too are normed per head, without weights
    keys_are_values: bool = False  # what is projected to keys, before their norm, is values too
    value_dim: int | None = None  # channels of a head's values, where they are not head_dim
    # Keys, rotated and normed, and values are rounded to 8 bits, each by a scale of the layer.
    rounded: bool = False

    @property
    def value(self) -> int:
        """Channels of a head's values."""
        return self.value_dim or self.head_dim

    @property
    def gate_rows(self) -> int:
        """Rows of each head's gate, where a checkpoint has those after the head's queries."""
        return 1 if self.gate_by_head else self.value

    @property
    def query_rows(self) -> int:
        """Rows of the matrix that gives queries."""
        return self.heads * self.head_dim

    @property
    def key_rows(self) -> int:
        """Rows of the matrix that gives keys."""
        return self.kv_heads * self.head_dim

    @property
    def value_rows(self) -> int:
        """Rows of the matrix that gives values."""
        return self.kv_heads * self.value

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention."""
        query, key, value = self.query_rows, self.key_rows, self.value_rows
        attended = self.heads * self.value
        fixed = self.clip_qkv or self.v_norm or self.keys_are_values
        values, out = ("", "residual_scale") if fixed else (VALUES, FROM_VALUES)
        for name, width, fold in (("q", query, ""), ("k", key, ""), ("v", value, values)):
            if name == "v" and self.keys_are_values:
                continue
            yield Weight(
                f"{name}.weight", (width, d_model), f"attention.{name}", reads="x", fold=fold
            )
            if self.qkv_bias:
                yield Weight(f"{name}.bias", (width,), fold=fold)
        yield Weight("o.weight", (d_model, attended), "attention.o", reads="attended", fold=out)
        if self.o_bias:
            yield Weight("o.bias", (d_model,), fold="residual_scale")
        if self.qk_norm not in ("none", "unit"):
            per_head = self.qk_norm != "full"
            yield Weight("q_norm.weight", (self.head_dim if per_head else query,))
            yield Weight("k_norm.weight", (self.head_dim if per_head else key,))
        if self.sinks:
            yield Weight("sinks.weight", (self.heads,))
        if self.gate != "none":
            width = self.heads if self.gate_by_head else attended
            yield Weight("gate.weight", (width, d_model), "attention.q", reads="x")
        if self.gate_bias:
            yield Weight("gate_bias.weight", (self.heads,))
        if self.rounded:
            yield Weight("k_scale.weight", (1,))
            yield Weight("v_scale.weight", (1,), fold=values)


@dataclass(frozen=True)
class SharedGqaSpec(GqaSpec):
    """Attention to the keys and values that the layer `source` keeps: of its own it has queries
    alone."""

    source: int = 0

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's attention."""
        for row in super().rows(d_model):
            if row.path.split(".")[0] not in OF_KEYS_AND_VALUES:
                yield row


@dataclass(frozen=True)
class BandSpec(GqaSpec):
    """Attention among the tokens of one call, without a cache: each sees itself and `reach` tokens
    on either side."""

    reach: int = 0


class MixerSpec(Protocol):
    """What mixes tokens in a layer: attention, or what stands in its place. The part that computes
    it is found by the type of its spec."""

    @property
    def rope(self) -> str | None:
        """The rotary table it reads, a name in ModelSpec.ropes."""

    @property
    def window(self) -> int | None:
        """Tokens that a token sees, itself included; None: all before it."""

    def rows(self, d_model: int) -> Iterator[Weight]:
        """The tensors of a layer's mixer, but for its norm."""


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts: `k` of `experts`, the lowest index winning ties.

    Experts are weighted by their scores, a softmax over all or a sigmoid of each, gathered at the k
    chosen and multiplied by `scale`; with `renorm` divided by their sum plus `renorm_eps` before.
    Softmax over only the k chosen logits is the same function as `renorm=True`. `logit_bias` is a
    part of the logits; `bias` is added for the choice alone, to the scores, or to the logits if the
    choice is `by_logits` (`Kolibri1TopKRouter`). A sum below
    `renorm_floor` counts as that (transformers' `Ernie4_5_MoeTopKRouter`). With `groups` of
    neighbours only experts of the `open_groups` best are chosen from, those whose `group_best`
    largest scores sum up highest (`DeepseekV3TopkRouter`, `DeepseekV2TopkRouter`). A tanh keeps
    logits within `softcap` (`LagunaTopKRouter`). With `noise` the host may add to what the choice
    is made by, logits or scores; weights never see it (RoE, arXiv 2509.17238). `weighed`: in the
    end each expert has a weight of its own (`Gemma4TextRouter`). After the experts come `idle`
    ones, which give what they are given (`LongcatFlashExperts`).
    """

    experts: int
    k: int
    renorm: bool = True
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False
    renorm_eps: float = 0.0
    scale: float = 1.0
    logit_bias: bool = False
    renorm_floor: float = 0.0
    groups: int = 1
    open_groups: int = 1
    group_best: int = 2
    softcap: float | None = None
    noise: bool = False
    by_logits: bool = False
    weighed: bool = False
    idle: int = 0

    @property
    def classes(self) -> int:
        """Rows of the gates."""
        return self.experts + self.idle

    @property
    def carry(self) -> int:
        """Channels handed on to the next layer's router."""
        return 0

    @property
    def takes(self) -> bool:
        """Whether it reads what the layer before handed on."""
        return False

    @property
    def ranking(self) -> Ranking | None:
        """What the choice is made by, as far as it takes to tell the highest: a score that rises
        with the logit changes no order, unless something is added. None with two biases, of
        logits and of their scores."""
        grouped = self.open_groups < self.groups
        scored = (self.bias and not self.by_logits) or (grouped and self.group_best > 1)
        if self.logit_bias and (self.bias or scored):
            return None
        ranking = Ranking(
            self.score if scored else "logits",
            self.bias or self.logit_bias,
            self.softcap if self.bias or scored else None,
        )
        if not grouped:
            return ranking
        return replace(
            ranking,
            groups=self.groups,
            open_groups=self.open_groups,
            group_best=self.group_best,
        )

    def rows(self, d_model: int) -> Iterator[Weight]:
        yield Weight("weight", (self.classes, d_model))
        if self.logit_bias:
            yield Weight("bias", (self.classes,))
        if self.bias:
            yield Weight("choice_bias", (self.classes,), centred=True)
        if self.weighed:
            yield Weight("expert_scale", (self.experts,))


@dataclass(frozen=True)
class Clamp:
    """The activation `(up + 1) * gate * sigmoid(alpha * gate)`, with a gate of at most `limit`, and
    an up between it and its negative.

    Source: transformers' `GptOssExperts`.
    """

    limit: float
    alpha: float


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: `down(activation(gate(x)) * up(x))`, or with the activation `clamp`; `width`
    channels wide inside. GELU is the one approximated by tanh. `gate_enters`: the gate of an expert
    multiplies what enters it, in place of what it gives. `limit`: silu(gate(x)) is at most that,
    and up(x) between it and its negative (`Step3p7Experts`). `squared`: `down(relu(up(x))^2)`,
    without a gate. `bias`: of all three, or of `down` alone."""

    width: int
    clamp: Clamp | None = None
    bias: bool | Literal["down"] = False
    activation: Literal["silu", "gelu"] = "silu"
    gate_enters: bool = False
    limit: float | None = None
    squared: bool = False

    @property
    def inner_bias(self) -> bool:
        """Whether what enters the activation has biases."""
        return self.bias is True

    def rows(self, d_model: int, role: str) -> Iterator[Weight]:
        """Its matrices, which a recipe calls `role`.gate, .up and .down, and their biases."""
        fixed = self.clamp or self.limit
        ups, out = ("", "residual_scale") if fixed else (UPS, FROM_UPS)
        branches = [("gate", ""), ("up", ups)]
        if self.squared:
            branches, out = [("up", UPS)], FROM_SQUARES
        for name, fold in branches:
            yield Weight(
                f"{name}.weight", (self.width, d_model), f"{role}.{name}", reads="x", fold=fold
            )
            if self.inner_bias:
                yield Weight(f"{name}.bias", (self.width,), fold=fold)
        yield Weight("down.weight", (d_model, self.width), f"{role}.down", reads="hidden", fold=out)
        if self.bias:
            yield Weight("down.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class SharedSpec:
    """An always-on expert; `gated` multiplies it by `sigmoid(w . x)`."""

    mlp: MlpSpec
    gated: bool = False

    def rows(self, d_model: int) -> Iterator[Weight]:
        for row in self.mlp.rows(d_model, "shared"):
            fold = SHARED_FROM_UPS if row.fold == FROM_UPS else row.fold
            yield replace(row, fold=fold).under("shared")
        if self.gated:
            yield Weight("shared_gate.weight", (1, d_model))


AnyRouterSpec = RouterSpec | EdaRouterSpec | SparseMixerSpec


@dataclass(frozen=True)
class LatentSpec:
    """Experts that work on `width` channels: a projection gives what enters them, and another one
    takes their sum back to the stream; `bias`: of both.

    Source: transformers' `NemotronHMoE` (`fc1_latent_proj`, `fc2_latent_proj`).
    """

    width: int
    bias: bool = False

    def entering(self, d_model: int) -> Iterator[Weight]:
        """The projection into the latent."""
        yield Weight("latent_in.weight", (self.width, d_model), "latent.in", reads="x")
        if self.bias:
            yield Weight("latent_in.bias", (self.width,))

    def leaving(self, d_model: int) -> Iterator[Weight]:
        """The one out of it. What multiplies all that is added to the stream is folded into the
        experts already: here the bias alone is in need of it."""
        yield Weight("latent_out.weight", (d_model, self.width), "latent.out", reads="mixed")
        if self.bias:
            yield Weight("latent_out.bias", (d_model,), fold="residual_scale")


@dataclass(frozen=True)
class MoeSpec:
    """`beside`: a gated MLP next to the experts. It reads the stream by a norm of its own; what it
    gives and what they give are each normed, before they are summed. `router_norm`: so does the
    router, which is given the root-th part of it (`Gemma4TextRouter`). `latent`: what routed
    experts work on, where that is not the stream."""

    router: AnyRouterSpec
    expert: MlpSpec
    shared: SharedSpec | None = None
    beside: MlpSpec | None = None
    router_norm: bool = False
    latent: LatentSpec | None = None

    def width(self, d_model: int) -> int:
        """Channels of what a routed expert takes and gives."""
        return self.latent.width if self.latent else d_model


FfnSpec = MlpSpec | MoeSpec


def router_norm_rows(norm: NormSpec, d_model: int, own: bool) -> Iterator[Weight]:
    """The norm of what a router reads, where that is its own."""
    return norm.rows(d_model, INVERSE_ROOT, "router_norm") if own else iter(())


def beside_rows(mlp: Iterable[AnyRow], norm: NormSpec, d_model: int) -> Iterator[AnyRow]:
    """An MLP of these rows next to the experts, and the norms of both."""
    yield from norm.rows(d_model, path="beside.norm")
    yield from (row.under("beside.mlp") for row in mlp)
    yield from norm.rows(d_model, STREAM_SCALE, "beside.after")
    yield from norm.rows(d_model, STREAM_SCALE, "beside.experts_after")


def entry_rows(d_model: int) -> Iterator[Weight]:
    """The vectors that an embedding is shifted and scaled by before the first layer."""
    yield Weight("entry.bias", (d_model,), fold=STREAM_SCALE)
    yield Weight("entry.scale", (d_model,))


@dataclass(frozen=True)
class LayerSpec:
    """`affine`: what the mixer and the feed-forward block add, and the stream itself, are each
    shifted and scaled by channel where they meet. `entry`: so is the embedding on its way into this
    layer. `norms`: where the norms of its halves stand, `ffn_norms` where those of the feed-forward
    block do if that differs. `keeps`: the mixer, and the feed-forward block, add to so many times
    the normed stream that they read, in place of the stream. `adds`: what multiplies what each
    adds, beside the model's own factor. `parallel`: both halves read the stream as it enters the
    layer. `scaled`: where there are norms after, the stream is multiplied by a number of the layer
    in the end. A layer may be one half alone. `router_group`: a checkpoint has one router for all
    layers of the same number (arXiv 2507.05724). `nth`: which addition to the stream each half is,
    where these are weighed. What experts give is not added, but `hands_on`: a later layer `takes`
    it, and its feed-forward block adds it. `stored`: the layer of the checkpoint, and the half of
    it, that this one is of (None: that of its number)."""

    mixer: MixerSpec | None
    ffn: FfnSpec | None
    affine: bool = False
    entry: bool = False
    norms: Norms = "before"
    keeps: tuple[float, float] | None = None
    adds: tuple[float, float] = (1.0, 1.0)
    ffn_norms: Norms | None = None
    parallel: bool = False
    scaled: bool = False
    router_group: int | None = None
    nth: tuple[int, int] | None = None
    hands_on: bool = False
    takes: bool = False
    stored: tuple[int, int] | None = None

    @property
    def mixer_residual(self) -> ResidualSpec:
        """How the mixer meets the stream."""
        keeps, nth = self.keeps and self.keeps[0], self.nth and self.nth[0]
        return ResidualSpec(self.norms, keeps, self.affine, self.parallel, nth=nth)

    @property
    def ffn_residual(self) -> ResidualSpec:
        """How the feed-forward block does."""
        norms, keeps = self.ffn_norms or self.norms, self.keeps and self.keeps[1]
        nth = self.nth and self.nth[1]
        later = (self.hands_on, self.takes)
        return ResidualSpec(norms, keeps, self.affine, self.parallel, self.scaled, nth, *later)

    def weights(
        self, number: int, d_model: int, norm: NormSpec
    ) -> Iterator[tuple[WeightName, Weight]]:
        """The tensors of the layer `number` of a model with such norms."""
        for row in self._mixer_rows(d_model, norm):
            yield WeightName(number, "attn", None, row.path), row
        for row in self._ffn_rows(d_model, norm):
            yield WeightName(number, "ffn", None, row.path), row
        if isinstance(self.ffn, MoeSpec):
            expert_rows = tuple(self.ffn.expert.rows(self.ffn.width(d_model), "experts"))
            for expert in range(self.ffn.router.experts):
                for row in expert_rows:
                    yield WeightName(number, "ffn", expert, row.path), row

    def _mixer_rows(self, d_model: int, norm: NormSpec) -> Iterator[Weight]:
        if self.mixer is None:
            return
        if self.entry:
            yield from entry_rows(d_model)
        residual = self.mixer_residual
        yield from residual.read_rows(norm, d_model)
        yield from self.mixer.rows(d_model)
        yield from residual.added_rows(norm, d_model)

    def _ffn_rows(self, d_model: int, norm: NormSpec) -> Iterator[Weight]:
        """Those of experts aside."""
        if self.ffn is None:
            return
        norm = norm.ungated if isinstance(self.ffn, MlpSpec) else norm
        residual = self.ffn_residual
        yield from residual.read_rows(norm, d_model)
        if isinstance(self.ffn, MlpSpec):
            yield from (row.under("mlp") for row in self.ffn.rows(d_model, "dense"))
        else:
            yield from router_norm_rows(norm, d_model, self.ffn.router_norm)
            yield from (row.under("router") for row in self.ffn.router.rows(d_model))
            if self.ffn.latent is not None:
                yield from self.ffn.latent.entering(d_model)
                yield from self.ffn.latent.leaving(d_model)
            if self.ffn.shared is not None:
                yield from self.ffn.shared.rows(d_model)
            if self.ffn.beside is not None:
                yield from beside_rows(self.ffn.beside.rows(d_model, "dense"), norm, d_model)
        yield from residual.added_rows(norm, d_model)


@dataclass(frozen=True)
class HeadSpec:
    """Final norm and projection to the vocabulary or, of a token classifier, to its `labels`;
    logits are multiplied by `logit_scale`, and kept within `softcap` by a tanh. `eps` is that of
    its norm, where it has another."""

    tied: bool
    logit_scale: float = 1.0
    labels: tuple[str, ...] = ()
    bias: bool = False
    softcap: float | None = None
    eps: float | None = None

    def norm(self, norm: NormSpec) -> NormSpec:
        """Its own, in a model of such norms."""
        return replace(norm.ungated, eps=self.eps or norm.eps)

    def rows(self, count: int, d_model: int, norm: NormSpec) -> Iterator[Weight]:
        """Those of `count` scores. The logit scale goes into the norm: the other weight may be the
        embedding's. Labels are few, and their rows stay fp16."""
        yield from norm.ungated.rows(d_model, "logit_scale")
        role = None if self.labels else "head"
        yield Weight(HEAD.path, (count, d_model), role, reads="x")
        if self.bias:
            yield Weight(HEAD_BIAS.path, (count,), fold="logit_scale")


@dataclass(frozen=True)
class TrackSpec:
    """Parallel tracks (arXiv 2602.07306): `count` of them run apart, each with layers of its own,
    and meet after every `depth` of these and after the last: all go on with the mean or the sum of
    what they gave.

    A model has its layers in the order in which they run one by one: block after block of `depth`
    (or what is left), in a block track after track.
    """

    count: int
    depth: int
    reduce: Literal["mean", "sum"]

    def blocks(self, layers: int) -> Iterator[tuple[range, ...]]:
        """Out of so many layers those of each track, block by block."""
        each = layers // self.count
        for first in range(0, each, self.depth):
            depth, start = min(self.depth, each - first), first * self.count
            yield tuple(
                range(start + track * depth, start + (track + 1) * depth)
                for track in range(self.count)
            )

    def synchronisations(self, layers: int) -> "Synchronisations":
        """Of a model with so many layers in all."""
        meetings = sum(1 for _ in self.blocks(layers)) if self.count > 1 else 0
        return Synchronisations(self.count, meetings, 2 * layers // self.count)


@dataclass(frozen=True)
class Synchronisations:
    """How often the parts of a model wait for each other in one step: its `tracks`, and what they
    would with tensor parallelism, after either half of each layer."""

    tracks: int
    each_step: int
    tensor_parallel: int

    @property
    def saved(self) -> float:
        """The share that tracks do without: 1 - 1 / (2 depth), where blocks are whole."""
        return 1 - self.each_step / self.tensor_parallel

    def as_json(self) -> dict[str, float]:
        return {
            "tracks": self.tracks,
            "each_step": self.each_step,
            "tensor_parallel": self.tensor_parallel,
            "saved": self.saved,
        }

    @property
    def sentence(self) -> str:
        return (
            f"{self.tracks} tracks meet {self.each_step} times a step, where tensor parallelism "
            f"synchronises {self.tensor_parallel} times: {100 * self.saved:.4g} % saved"
        )


@dataclass(frozen=True)
class InnerScale:
    """What values of an attention, and the linear branch of all gated MLPs of a layer, are
    multiplied by; what reads them is divided by it. Powers of two, exact as `stream_scale`."""

    values: float = 1.0
    ups: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """One model. Every layer is `x += residual_scale * mixer(norm(x)); x += residual_scale *
    ffn(norm(x))`, but for what its LayerSpec says.

    `stream_scale` multiplies x itself, everywhere, which no norm of it sees (`with_stream`): a
    power of two, so that fp16 holds a stream that it would not hold as it is. `inner` does the same
    inside layers. What shared experts give is multiplied by `shared_scale`.
    """

    family: str
    d_model: int
    vocab: int
    context: int  # the model's own limit, in tokens
    norm: NormSpec
    layers: tuple[LayerSpec, ...]
    head: HeadSpec
    ropes: dict[str, RopeSpec]
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    shared_scale: float = 1.0
    stream_scale: float = 1.0
    inner: Mapping[int, InnerScale] = field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tracks: TrackSpec | None = None

    @property
    def scores(self) -> int:
        """Rows of the head: labels, or the vocabulary."""
        return len(self.head.labels) or self.vocab

    @property
    def synchronisations(self) -> Synchronisations | None:
        """How often tracks meet, where there are any."""
        return self.tracks.synchronisations(len(self.layers)) if self.tracks else None

    @property
    def is_encoder(self) -> bool:
        """Whether all tokens are taken in at once, and nothing is kept."""
        return any(isinstance(layer.mixer, BandSpec) for layer in self.layers)

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: mostly itself."""
        mixer = self.layers[layer].mixer
        return mixer.source if isinstance(mixer, SharedGqaSpec) else layer

    @property
    def lenders(self) -> frozenset[int]:
        """The layers whose keys and values others read too."""
        numbers = range(len(self.layers))
        return frozenset(self.source(number) for number in numbers if self.source(number) != number)

    def weights(self) -> Iterator[tuple[WeightName, Weight]]:
        """Every tensor the model needs, in the order of the layers."""
        table = Weight(EMBEDDING.path, (self.vocab, self.d_model), "embedding", fold="embed_scale")
        yield EMBEDDING, table
        for number, layer in enumerate(self.layers):
            yield from layer.weights(number, self.d_model, self.norm)
        for row in self.head.rows(self.scores, self.d_model, self.norm):
            yield WeightName(None, HEAD.part, None, row.path), row

    def distinct_weights(self) -> Iterator[tuple[WeightName, Weight]]:
        """`weights`, but what layers share only once, for the first of them."""
        met = set()
        for name, row in self.weights():
            layer = None if name.layer is None else self.layers[name.layer]
            group = layer.router_group if layer and name.path.startswith("router.") else None
            half = layer.stored if layer and name.path == "norm.weight" else None
            if group is not None or half is not None:
                place = (group, half, name.part, name.path)
                if place in met:
                    continue
                met.add(place)
            yield name, row

    def multiplier(self, fold: str, layer: int | None, part: str = "attn") -> float:
        """The multiplier that a row of a `part` of a layer asks for with `fold`; 1 where it asks
        for none."""
        added, inner = self.residual_scale * self.stream_scale, InnerScale()
        values = inner.values
        if layer is not None:
            inner = self.inner.get(layer, inner)
            added *= self.layers[layer].adds[part == "ffn"]
            values = self.inner.get(self.source(layer), InnerScale()).values
        mixer = None if layer is None else self.layers[layer].mixer
        multipliers = {
            "embed_scale": self.embed_scale * self.stream_scale,
            "residual_scale": added,
            VALUES: values,
            FROM_VALUES: added / values,
            UPS: inner.ups,
            FROM_UPS: added / inner.ups,
            SHARED_FROM_UPS: added / inner.ups * self.shared_scale,
            FROM_SQUARES: added / inner.ups**2,
            STREAM_SCALE: self.stream_scale,
            INVERSE_ROOT: self.d_model**-0.5,
            LATENT_SCALE: getattr(mixer, "latent_scale", 1.0),
            "logit_scale": self.head.logit_scale,
        }
        return multipliers[fold] if fold else 1.0

    @property
    def may_scale_stream(self) -> bool:
        """Whether all that reads the stream norms it first, and none of it becomes the stream."""
        if any(layer.hands_on for layer in self.layers):
            return False
        told = ((layer.norms, layer.ffn_norms, layer.keeps) for layer in self.layers)
        return all("after" not in norms and keeps is None for *norms, keeps in told)

    def with_stream(self, scale: float) -> Self:
        """The same function, its stream times `scale` (in place of the one that it had). Norms of
        the stream weigh their eps by the square; all others are of what a norm was before."""
        factor = (scale / self.stream_scale) ** 2
        norm = replace(self.norm, eps=self.norm.eps * factor)
        head = replace(self.head, eps=self.head.eps and self.head.eps * factor)
        return replace(self, norm=norm, head=head, stream_scale=scale)
