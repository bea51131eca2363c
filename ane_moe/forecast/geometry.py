"""A model's matrices: from the architecture that `convert` reads, or nearly from a config.json.

Enough for sizes and times, not for maths: biases and convolution kernels are left out. Of a
config.json that `convert` refuses, a layer type that is not known is counted as attention and named
in `notes`.
"""

from dataclasses import dataclass
from typing import Any

from ane_moe.errors import UserError
from ane_moe.families.config import MAX_EXPERTS, MAX_LAYERS, Config
from ane_moe.model.spec import GqaSpec, LayerSpec, MlpSpec, ModelSpec

ATTENTION = {"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"}
CONVOLUTION = {"conv", "short_conv"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token")
LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
SHARED_COUNT = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, and what a recipe calls it."""

    role: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class LayerGeometry:
    """One layer. `dense`: its feed-forward part where it has no experts; `expert`: one of `experts`; `shared`: what
    every token passes beside them. `cache_values` are KV values a token, `state_values` others that stay. `router` and
    each `norm` are elements that remain fp16."""

    mixer: tuple[Matrix, ...]
    cache_values: int
    state_values: int = 0
    dense: tuple[Matrix, ...] = ()
    expert: tuple[Matrix, ...] = ()
    shared: tuple[Matrix, ...] = ()
    experts: int = 0
    k: int = 0
    router: int = 0
    norm: int = 0


@dataclass(frozen=True)
class Geometry:
    """A model. `context` is its own limit."""

    model_type: str
    d_model: int
    vocab: int
    context: int
    layers: tuple[LayerGeometry, ...]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """All weights in matrices: layers and head; the embedding if it is another table counts once more."""
        return sum(map(_layer_weights, self.layers)) + self.vocab * self.d_model


def geometry_of_spec(spec: ModelSpec) -> Geometry:
    """The geometry of an architecture that `convert` knows."""
    layers = tuple(_layer_of_spec(layer, spec.d_model) for layer in spec.layers)
    return Geometry(spec.family, spec.d_model, spec.vocab, spec.context, layers)


def names_experts(values: dict[str, Any], depth: int = 2) -> bool:
    """Whether a configuration, or one inside it, gives a number of experts."""
    if any(values.get(name) is not None for name in EXPERTS):
        return True
    inner = (value for value in values.values() if isinstance(value, dict) and depth)
    return any(names_experts(value, depth - 1) for value in inner)


def geometry_of(values: dict[str, Any], where: str = "config.json") -> Geometry:
    """The geometry of a configuration by the fields that families share: an approximation.

    Raises UserError for a field that is missing or makes no sense, and for a model without experts.
    """
    inner = values.get("text_config")
    reader = _Reader(Config(inner if isinstance(inner, dict) else values, where))
    count = reader.config.integer("num_hidden_layers", at_most=MAX_LAYERS)
    layers = tuple(reader.layer(number) for number in range(count))
    if not any(layer.experts for layer in layers):
        found = str(values.get("model_type"))
        raise UserError(f"{where} describes no experts", found, "give a Mixture-of-Experts model")
    context = reader.config.integer("max_position_embeddings", "model_max_length")
    name = str(values.get("model_type", reader.config.values.get("model_type", "unknown")))
    return Geometry(name, reader.d_model, reader.config.integer("vocab_size"), context, layers, reader.notes())


def _layer_weights(layer: LayerGeometry) -> int:
    parts = (*layer.mixer, *layer.dense, *layer.shared)
    return sum(m.weights for m in parts) + layer.experts * sum(m.weights for m in layer.expert) + layer.router


def _layer_of_spec(layer: LayerSpec, d: int) -> LayerGeometry:
    mixer, ffn = layer.mixer, layer.ffn
    attention, cache = _gqa(mixer, d), 2 * mixer.kv_heads * mixer.head_dim
    if isinstance(ffn, MlpSpec):
        return LayerGeometry(attention, cache, dense=_mlp("dense", ffn.width, d), norm=d)
    return LayerGeometry(
        attention,
        cache,
        expert=_mlp("experts", ffn.expert.width, d),
        shared=_mlp("shared", ffn.shared.mlp.width, d) if ffn.shared else (),
        experts=ffn.router.experts,
        k=ffn.router.k,
        router=ffn.router.experts * d,
        norm=d,
    )


def _gqa(mixer: GqaSpec, d: int) -> tuple[Matrix, ...]:
    query, key = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    rows = {"q": query, "k": key, "v": key}
    inputs = (Matrix(f"attention.{name}", size, d) for name, size in rows.items())
    return (*inputs, Matrix("attention.o", d, query))


def _mlp(role: str, width: int, d: int) -> tuple[Matrix, ...]:
    inward = (Matrix(f"{role}.{name}", width, d) for name in ("gate", "up"))
    return (*inward, Matrix(f"{role}.down", d, width))


class _Reader:
    """Layers out of the fields that the families use."""

    def __init__(self, config: Config):
        self.config = config
        self.d_model = config.integer("hidden_size")
        self.types = config.strings("layer_types")
        self.sparse = config.strings("mlp_layer_types")

    def notes(self) -> tuple[str, ...]:
        """What the figures leave out or take for something else."""
        strange = sorted(set(self.types) - ATTENTION - CONVOLUTION)
        return tuple(f"layers of type {name} are counted as attention" for name in strange)

    def layer(self, number: int) -> LayerGeometry:
        mixer, cache, state = self._mixer(number)
        if self._is_dense(number):
            width = self.config.integer("intermediate_size")
            dense = _mlp("dense", width, self.d_model)
            return LayerGeometry(mixer, cache, state, dense=dense, norm=self.d_model)
        experts = self.config.integer(*EXPERTS, at_most=MAX_EXPERTS)
        k = self.config.integer(*CHOSEN, at_most=experts)
        shared = self._shared()
        return LayerGeometry(
            mixer,
            cache,
            state,
            expert=_mlp("experts", self._expert_width(), self.d_model),
            shared=_mlp("shared", shared, self.d_model) if shared else (),
            experts=experts,
            k=k,
            router=self._router(experts),
            norm=self.d_model,
        )

    def _mixer(self, number: int) -> tuple[tuple[Matrix, ...], int, int]:
        """Matrices, KV values a token, values of other states."""
        d = self.d_model
        if number < len(self.types) and self.types[number] in CONVOLUTION:
            return (Matrix("attention.q", 3 * d, d), Matrix("attention.o", d, d)), 0, 2 * d
        heads = self.config.integer("num_attention_heads")
        if self.config.has("kv_lora_rank"):
            return self._latent(heads)
        kv_heads = self.config.integer("num_key_value_heads") if self.config.has("num_key_value_heads") else heads
        head = self.config.integer("head_dim") if self.config.has("head_dim") else d // heads
        query, key = heads * head, kv_heads * head
        matrices = [Matrix("attention.q", query, d), Matrix("attention.k", key, d), Matrix("attention.v", key, d)]
        return (*matrices, Matrix("attention.o", d, query)), 2 * key, 0

    def _latent(self, heads: int) -> tuple[tuple[Matrix, ...], int, int]:
        """Latent attention: the cache holds the latent and the rotary key."""
        d, latent = self.d_model, self.config.integer("kv_lora_rank")
        nope, rope = self.config.integer("qk_nope_head_dim"), self.config.integer("qk_rope_head_dim")
        value = self.config.integer("v_head_dim")
        query, inner = heads * (nope + rope), d
        matrices = [Matrix("attention.k", latent + rope, d), Matrix("attention.v", heads * (nope + value), latent)]
        if self.config.has("q_lora_rank"):
            inner = self.config.integer("q_lora_rank")
            matrices.append(Matrix("attention.q", inner, d))
        matrices += [Matrix("attention.q", query, inner), Matrix("attention.o", d, heads * value)]
        return tuple(matrices), latent + rope, 0

    def _is_dense(self, number: int) -> bool:
        if self.sparse:
            return number < len(self.sparse) and self.sparse[number] == "dense"
        if number in self.config.integers("mlp_only_layers"):
            return True
        leading = next((self.config.values[name] for name in LEADING_DENSE if self.config.has(name)), 0)
        step = self.config.integer("decoder_sparse_step") if self.config.has("decoder_sparse_step") else 1
        return (isinstance(leading, int) and number < leading) or (number + 1) % step != 0

    def _expert_width(self) -> int:
        for name in ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size"):
            if self.config.has(name):
                return self.config.integer(name)
        raise self.config.missing("moe_intermediate_size", "intermediate_size")

    def _shared(self) -> int:
        """Inner width of what every token passes beside its experts, 0 for nothing."""
        if self.config.values.get("enable_moe_block") is True:
            return self.config.integer("intermediate_size")         # Gemma: a dense branch beside the experts
        given = [name for name in SHARED_WIDTH if self.config.values.get(name)]
        if given:
            return self.config.integer(given[0])
        counted = [name for name in SHARED_COUNT if self.config.values.get(name)]
        return self.config.integer(counted[0]) * self._expert_width() if counted else 0

    def _router(self, experts: int) -> int:
        """Elements of the router: one matrix, or ZAYA's MLP, whose last class stands for no expert."""
        if self.config.has("router_hidden_size"):
            width = self.config.integer("router_hidden_size")
            return width * self.d_model + 2 * width * width + (experts + 1) * width
        return experts * self.d_model
