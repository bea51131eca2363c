"""Finds our tensors in a checkpoint by a family's key table.

A key table maps our names to the checkpoint's, with `{layer}` and `{expert}` for the numbers. An entry lists
alternatives, of which the first that the checkpoint has is taken: the same model is found in more than one form.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ane_moe.checkpoint import TensorSource, listed
from ane_moe.errors import UserError
from ane_moe.model.weight import EMBEDDING, HEAD, Weight, WeightName
from ane_moe.spec import ModelSpec, MoeSpec


@dataclass(frozen=True)
class Fused:
    """One expert's share of a tensor that stacks all experts of a layer along its first axis.

    `part` of `parts` equal runs of rows: gate and up are the first and second half of one tensor.
    """

    key: str
    part: int = 0
    parts: int = 1


KeyTable = Mapping[str, tuple[str | Fused, ...]]

LAYER = "model.layers.{layer}"


def find_tensors(spec: ModelSpec, names: Collection[str], table: KeyTable) -> dict[WeightName, TensorSource]:
    """A source for every tensor that `spec` needs, out of the checkpoint's keys `names`.

    A tied head takes whichever of the two tensors is stored, each its own when both are: transformers does not tie
    stored tensors that differ (`tie_weights`). Raises UserError naming the keys that are missing.
    """
    if spec.head.tied:
        embed, head = table[str(EMBEDDING)], table[str(HEAD)]
        table = {**table, str(EMBEDDING): embed + head, str(HEAD): head + embed}
    sources, missing = {}, []
    for name, weight in spec.weights():
        alternatives = [_source(spec, name, weight, entry) for entry in table[name.template]]
        stored = next((source for source in alternatives if source.key in names), None)
        if stored is None:
            missing.append(alternatives[0].key)
        else:
            sources[name] = stored
    if missing:
        raise UserError(f"the checkpoint lacks {len(missing)} tensors that its config.json implies", listed(missing))
    return sources


def _source(spec: ModelSpec, name: WeightName, weight: Weight, entry: str | Fused) -> TensorSource:
    numbers = {"layer": name.layer, "expert": name.expert}
    scale = spec.multiplier(weight.fold)
    if isinstance(entry, str):
        return TensorSource(name, entry.format(**numbers), weight.shape, scale=scale, weight=weight)
    assert name.layer is not None
    ffn, rows = spec.layers[name.layer].ffn, weight.shape[0]
    assert isinstance(ffn, MoeSpec)
    return TensorSource(
        name,
        entry.key.format(**numbers),
        (ffn.router.experts, entry.parts * rows, *weight.shape[1:]),
        index=name.expert,
        rows=None if entry.parts == 1 else (entry.part * rows, (entry.part + 1) * rows),
        scale=scale,
        weight=weight,
    )


SKELETON: KeyTable = {
    "embed.weight": ("model.embed_tokens.weight",),
    "head.norm.weight": ("model.norm.weight",),
    "head.rows.weight": ("lm_head.weight",),
    "layers.{layer}.attn.norm.weight": (f"{LAYER}.input_layernorm.weight",),
    "layers.{layer}.attn.q_norm.weight": (f"{LAYER}.self_attn.q_norm.weight",),
    "layers.{layer}.attn.k_norm.weight": (f"{LAYER}.self_attn.k_norm.weight",),
    "layers.{layer}.ffn.norm.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    **{
        f"layers.{{layer}}.attn.{name}.{kind}": (f"{LAYER}.self_attn.{name}_proj.{kind}",)
        for name in "qkvo"
        for kind in ("weight", "bias")
    },
}


def mlp_keys(ours: str, theirs: str) -> KeyTable:
    """A gated MLP of a layer, stored as `gate_proj`, `up_proj` and `down_proj`."""
    return {
        f"layers.{{layer}}.{ours}.{name}.weight": (f"{LAYER}.{theirs}.{name}_proj.weight",)
        for name in ("gate", "up", "down")
    }


def expert_keys(*forms: dict[str, str | Fused]) -> KeyTable:
    """The experts, in the `forms` in which they may be stored: each says where gate, up and down are."""
    return {
        f"layers.{{layer}}.ffn.experts.{{expert}}.{name}.weight": tuple(form[name] for form in forms)
        for name in ("gate", "up", "down")
    }


def each_expert(prefix: str, gate: str, up: str, down: str) -> dict[str, str | Fused]:
    """Experts stored one by one, under these names."""
    names = {"gate": gate, "up": up, "down": down}
    return {name: f"{LAYER}.{prefix}.{{expert}}.{theirs}.weight" for name, theirs in names.items()}


def fused_experts(gate_up: str, down: str) -> dict[str, str | Fused]:
    """Experts stacked in `gate_up` [experts, 2 * width, d] and `down` [experts, d, width]."""
    return {
        "gate": Fused(f"{LAYER}.{gate_up}", part=0, parts=2),
        "up": Fused(f"{LAYER}.{gate_up}", part=1, parts=2),
        "down": Fused(f"{LAYER}.{down}"),
    }


# How transformers 4 and 5 store the experts of most families.
MLP_EXPERTS = expert_keys(
    each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)
