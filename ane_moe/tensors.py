"""The names and shapes of our own tensors, as a ModelSpec implies them, and the multipliers folded into them.

A checkpoint's keys are a family's business; downstream of the families only these names exist:

    embed.weight [vocab, d]                                     head.norm.weight [d], head.weight [vocab, d]
    layers.N.attn.{norm,q,k,v,o,q_norm,k_norm}.weight           layers.N.attn.{q,k,v,o}.bias
    layers.N.ffn.norm.weight                                    layers.N.ffn.{gate,up,down}.weight       (dense)
    layers.N.ffn.router.weight [experts, d]                     layers.N.ffn.experts.E.{gate,up,down}.weight
    layers.N.ffn.shared.{gate,up,down}.weight                   layers.N.ffn.shared_gate.weight [1, d]
"""

from collections.abc import Sequence

from ane_moe.spec import GqaSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec

Shapes = dict[str, tuple[int, ...]]

RESIDUAL_WRITERS = ("attn.o.weight", "attn.o.bias", "down.weight")


def tensor_shapes(spec: ModelSpec) -> Shapes:
    """Every tensor the model needs: our name -> shape, in the order of the layers."""
    shapes: Shapes = {"embed.weight": (spec.vocab, spec.d_model)}
    for number, layer in enumerate(spec.layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer_shapes(layer, spec.d_model).items()}
    return shapes | {"head.norm.weight": (spec.d_model,), "head.weight": (spec.vocab, spec.d_model)}


def layer_shapes(layer: LayerSpec, d_model: int) -> Shapes:
    """The tensors of one layer, named from `attn.` and `ffn.` on."""
    ffn = _moe_shapes(layer.ffn, d_model) if isinstance(layer.ffn, MoeSpec) else _mlp_shapes("ffn", layer.ffn, d_model)
    return _gqa_shapes(layer.mixer, d_model) | {"ffn.norm.weight": (d_model,)} | ffn


def tensor_of(kind: str, layer: int | None, layers: Sequence[int], experts: Sequence[int], prefix: str,
              weight: str, groups: Sequence[Sequence[int]] = ()) -> str:
    """Our tensor of which a shard's block holds the parameter `weight`.

    `layers` are those of a stack and `experts` those of a part; `prefix` names the copy of a block in a package of
    expert functions: `expert_` and the number of its first one, or `shared`. `groups` are the experts of those copies
    where they are not neighbours.
    """
    if kind == "lm_head":
        return "head.norm.weight" if weight == "norm.weight" else "head.weight"
    if kind == "stack":
        _, index, part, rest = weight.split(".", 3)
        return f"layers.{layers[int(index)]}.{part}.{rest.removeprefix('mlp.')}"
    if weight.startswith("experts."):
        _, index, rest = weight.split(".", 2)
        first = int(prefix.removeprefix("expert_")) if prefix else experts[0]
        mine = next((group for group in groups if group[0] == first), None)
        weight = f"experts.{mine[int(index)] if mine else first + int(index)}.{rest}"
    part = "" if weight.startswith(("attn.", "ffn.")) else "attn." if kind == "attn" else "ffn."
    return f"layers.{layer}.{part}{weight.removeprefix('mlp.')}"


def folded_scale(spec: ModelSpec, name: str) -> float:
    """The multiplier folded into the tensor `name`, so that no graph needs an op for it.

    The residual multiplier goes into everything that writes to the residual, the embedding multiplier into the
    embedding, and the logit scale into the final norm (the head's own weight may be the embedding's).
    """
    if name == "embed.weight":
        return spec.embed_scale
    if name == "head.norm.weight":
        return spec.head.logit_scale
    return spec.residual_scale if name.endswith(RESIDUAL_WRITERS) else 1.0


def _gqa_shapes(mixer: GqaSpec, d_model: int) -> Shapes:
    query, key = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    shapes: Shapes = {
        "attn.norm.weight": (d_model,),
        "attn.q.weight": (query, d_model),
        "attn.k.weight": (key, d_model),
        "attn.v.weight": (key, d_model),
        "attn.o.weight": (d_model, query),
    }
    if mixer.qkv_bias:
        shapes |= {"attn.q.bias": (query,), "attn.k.bias": (key,), "attn.v.bias": (key,)}
    if mixer.o_bias:
        shapes |= {"attn.o.bias": (d_model,)}
    if mixer.qk_norm == "head":
        shapes |= {"attn.q_norm.weight": (mixer.head_dim,), "attn.k_norm.weight": (mixer.head_dim,)}
    if mixer.qk_norm == "full":
        shapes |= {"attn.q_norm.weight": (query,), "attn.k_norm.weight": (key,)}
    return shapes


def _moe_shapes(moe: MoeSpec, d_model: int) -> Shapes:
    shapes: Shapes = {"ffn.router.weight": (moe.router.experts, d_model)}
    for expert in range(moe.router.experts):
        shapes |= _mlp_shapes(f"ffn.experts.{expert}", moe.expert, d_model)
    if moe.shared is not None:
        shapes |= _mlp_shapes("ffn.shared", moe.shared.mlp, d_model)
        if moe.shared.gated:
            shapes["ffn.shared_gate.weight"] = (1, d_model)
    return shapes


def _mlp_shapes(prefix: str, mlp: MlpSpec, d_model: int) -> Shapes:
    return {
        f"{prefix}.gate.weight": (mlp.width, d_model),
        f"{prefix}.up.weight": (mlp.width, d_model),
        f"{prefix}.down.weight": (d_model, mlp.width),
    }
