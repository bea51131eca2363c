"""ModelSpec: an architecture as data, without weights.

Everything downstream (blocks, plan, convert) reads these frozen dataclasses and nothing else of a model's
configuration. Sizes are in elements; `None` means the model does not have the part.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """A normalisation over channels. `offset` is added to the stored weight (1 for "(1 + w)" norms)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


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


# One member per mixer block; MLA, CCA and short convolutions join with their blocks.
MixerSpec = GqaSpec


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts: `k` of `experts`, the lowest index winning ties.

    `score="softmax"` weights by the full softmax, gathered at the k chosen (renormalised when `renorm`);
    softmax over only the k chosen logits is the same function as `renorm=True`.
    """

    experts: int
    k: int
    score: Literal["softmax"] = "softmax"
    renorm: bool = True
    bias: bool = False


@dataclass(frozen=True)
class MlpSpec:
    """A gated MLP: `down(act(gate(x)) * up(x))`, `width` channels wide inside."""

    width: int
    act: Literal["silu"] = "silu"


@dataclass(frozen=True)
class SharedSpec:
    """An always-on expert; `gated` multiplies it by `sigmoid(w . x)`."""

    mlp: MlpSpec
    gated: bool = False


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


@dataclass(frozen=True)
class HeadSpec:
    """Final norm and vocabulary projection; logits are multiplied by `logit_scale`."""

    tied: bool
    bias: bool = False
    logit_scale: float = 1.0


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
