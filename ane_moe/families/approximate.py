"""An approximate ModelSpec of a model that no family describes, from fields that families share.

For sizes and times only: what such a model computes is not known. A part that ModelSpec has no form
of is counted as attention of the same size, and `notes` says so.
"""

import math
from dataclasses import dataclass
from typing import Any

from ane_moe.errors import UserError
from ane_moe.families.config import CHOSEN, EXPERTS, MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.model.spec import (
    FfnSpec,
    GqaSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RouterSpec,
    SharedSpec,
)

ATTENTION = {"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"}
CONVOLUTION = {"conv", "short_conv"}
LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
SHARED_COUNT = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")
HEAD_DIM = 16  # at most, of attention that stands for something else: fits any size well


@dataclass(frozen=True)
class Approximation:
    """A model of nearly the same size. `notes`: what it takes for something else, in sentences."""

    spec: ModelSpec
    notes: tuple[str, ...]


def names_experts(values: dict[str, Any], depth: int = 2) -> bool:
    """Whether a configuration, or one inside it, gives a number of experts."""
    if any(values.get(name) is not None for name in EXPERTS):
        return True
    inner = (value for value in values.values() if isinstance(value, dict) and depth)
    return any(names_experts(value, depth - 1) for value in inner)


def approximate(values: dict[str, Any], where: str = "config.json") -> Approximation:
    """The model of a configuration, nearly.

    Raises UserError for a field that is missing or makes no sense, and for a model without experts.
    """
    inner = values.get("text_config")
    config = Config(inner if isinstance(inner, dict) else values, where)
    reader = _Reader(config)
    count = config.integer("num_hidden_layers", at_most=MAX_LAYERS)
    layers = tuple(reader.layer(number) for number in range(count))
    if not any(isinstance(layer.ffn, MoeSpec) for layer in layers):
        found = str(values.get("model_type"))
        raise UserError(f"{where} describes no experts", found, "give a Mixture-of-Experts model")
    spec = ModelSpec(
        family=str(values.get("model_type", config.values.get("model_type", "unknown"))),
        d_model=reader.d_model,
        vocab=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings", "model_max_length"),
        norm=NormSpec(),
        layers=layers,
        head=HeadSpec(tied=False),
        ropes={},
    )
    return Approximation(spec, reader.notes())


class _Reader:
    """Layers out of the fields that the families use."""

    def __init__(self, config: Config):
        self.config = config
        self.d_model = config.integer("hidden_size")
        self.types = config.strings("layer_types")
        self.sparse = config.strings("mlp_layer_types")

    def notes(self) -> tuple[str, ...]:
        """What the figures take for something else."""
        notes = [
            f"layers of type {name} are counted as attention"
            for name in sorted(set(self.types) - ATTENTION - CONVOLUTION)
        ]
        if set(self.types) & CONVOLUTION:
            notes.append("short convolutions are counted as attention of the same size")
        if self.config.has("kv_lora_rank"):
            notes.append("latent attention is counted as attention of the same size")
        if self.config.has("router_hidden_size"):
            notes.append("the inner layers of routers are counted with the attention")
        return tuple(notes)

    def layer(self, number: int) -> LayerSpec:
        if self._is_dense(number):
            width = self.config.integer("intermediate_size")
            return LayerSpec(self._mixer(number, 0), MlpSpec(width))
        experts = self.config.integer(*EXPERTS, at_most=MAX_EXPERTS)
        return LayerSpec(self._mixer(number, self._inner_router(experts)), self._moe(experts))

    def _moe(self, experts: int) -> FfnSpec:
        k, shared = self.config.integer(*CHOSEN, at_most=experts), self._shared()
        always = SharedSpec(MlpSpec(shared)) if shared else None
        return MoeSpec(RouterSpec(experts, k), MlpSpec(self._expert_width()), always)

    def _mixer(self, number: int, beside: int) -> GqaSpec:
        """The attention, or what counts as it; `beside` are weights that are counted with it."""
        d = self.d_model
        if number < len(self.types) and self.types[number] in CONVOLUTION:
            return self._of_size(4 * d * d + beside, 2)  # into three times d, and out of d
        heads = self.config.integer("num_attention_heads")
        if self.config.has("kv_lora_rank"):
            return self._latent(heads, beside)
        kv_heads = self._optional("num_key_value_heads", heads)
        head = self._optional("head_dim", d // heads)
        if beside:
            return self._of_size(2 * d * head * (heads + kv_heads) + beside, 2 * kv_heads * head)
        return GqaSpec(heads, kv_heads, head, scale=1.0, rope=None)

    def _latent(self, heads: int, beside: int) -> GqaSpec:
        """The cache holds the latent and the rotary key."""
        d, latent = self.d_model, self.config.integer("kv_lora_rank")
        nope = self.config.integer("qk_nope_head_dim")
        rope = self.config.integer("qk_rope_head_dim")
        value = self.config.integer("v_head_dim")
        inner = self._optional("q_lora_rank", 0)
        query = heads * (nope + rope) * (inner or d) + inner * d
        key = (latent + rope) * d + heads * (nope + value) * latent
        return self._of_size(query + key + d * heads * value + beside, latent + rope)

    def _of_size(self, weights: int, cache: int) -> GqaSpec:
        """Attention with so many weights and so many values of cache a token, as nearly as whole
        heads allow."""
        keys = math.ceil(cache / 2)
        head = math.gcd(keys, HEAD_DIM)
        kv_heads = keys // head
        heads = max(1, round(weights / (2 * self.d_model * head)) - kv_heads)
        return GqaSpec(heads, kv_heads, head, scale=1.0, rope=None)

    def _optional(self, name: str, otherwise: int) -> int:
        return self.config.integer(name) if self.config.has(name) else otherwise

    def _is_dense(self, number: int) -> bool:
        if self.sparse:
            return number < len(self.sparse) and self.sparse[number] == "dense"
        if number in self.config.integers("mlp_only_layers"):
            return True
        given = (self.config.values[name] for name in LEADING_DENSE if self.config.has(name))
        leading, step = next(given, 0), self._optional("decoder_sparse_step", 1)
        return (isinstance(leading, int) and number < leading) or (number + 1) % step != 0

    def _expert_width(self) -> int:
        for name in ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"):
            if self.config.has(name):
                return self.config.integer(name)
        raise self.config.missing("moe_intermediate_size", "intermediate_size")

    def _shared(self) -> int:
        """Inner width of what every token passes beside its experts, 0 for nothing."""
        if self.config.values.get("enable_moe_block") is True:
            return self.config.integer("intermediate_size")  # Gemma: a branch beside the experts
        given = [name for name in SHARED_WIDTH if self.config.values.get(name)]
        if given:
            return self.config.integer(given[0])
        counted = [name for name in SHARED_COUNT if self.config.values.get(name)]
        return self.config.integer(counted[0]) * self._expert_width() if counted else 0

    def _inner_router(self, experts: int) -> int:
        """Weights of a router beyond one matrix: ZAYA's is an MLP, whose last class stands for no
        expert."""
        if not self.config.has("router_hidden_size"):
            return 0
        width = self.config.integer("router_hidden_size")
        whole = width * self.d_model + 2 * width * width + (experts + 1) * width
        return max(0, whole - experts * self.d_model)
