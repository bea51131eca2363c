"""Finds our tensors in a checkpoint by a family's key table.

A key table maps our names to the checkpoint's, with `{layer}`, `{half}` (of a layer that is more
than one of ours), `{expert}` and `{group}` (of layers that share a router) for the numbers. An
entry lists alternatives, of which the first that the checkpoint has is taken: the same model is
found in more than one form.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.checkpoints.key_names import decoder_prefixes
from ane_moe.errors import UserError
from ane_moe.model.spec import ModelSpec, MoeSpec
from ane_moe.model.weight import EMBEDDING, HEAD, Weight, WeightName
from ane_moe.wording import counted, listed


@dataclass(frozen=True)
class Fused:
    """One expert's share of a tensor that stacks all experts of a layer along its first axis.

    `part` of `parts` equal runs of rows: gate and up are the first and second half of one tensor.
    `transposed`: matrices are stored with what enters them first, so that the runs are of columns.
    `interleaved`: in place of runs every `parts`-th one, from `part` on; of columns, or of a bias.
    """

    key: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Stacked:
    """One expert's run of rows of a matrix in which those of all experts are one below the other;
    `transposed`: with what leaves an expert first."""

    key: str
    transposed: bool = False


@dataclass(frozen=True)
class Rows:
    """`part` of `parts` equal runs of rows of one stored tensor."""

    key: str
    part: int
    parts: int


@dataclass(frozen=True)
class Paired:
    """Rows of heads that are rotated in pairs of neighbours. Ours are half-split: of each head the
    first of all pairs, then the second. Heads are as wide as the mixer's field `heads` says."""

    key: str
    heads: str = "head_dim"


@dataclass(frozen=True)
class Only:
    """The first entry, of the one or more, of a stored tensor's first axis."""

    key: str
    of: int = 1


@dataclass(frozen=True)
class Turned:
    """A matrix that is stored with what enters it first."""

    key: str


@dataclass(frozen=True)
class Framed:
    """A vector that is stored with `before` axes of one entry before its own, and `after` behind
    it."""

    key: str
    before: int
    after: int


@dataclass(frozen=True)
class AroundOne:
    """A multiplier of which the checkpoint has what differs from 1."""

    key: str


@dataclass(frozen=True)
class Runs:
    """Of each run of rows those that are of `part`. A run is made up of parts `of` so many rows as
    those fields of the layer's mixer say; what is rotated may be in pairs of neighbours."""

    key: str
    of: tuple[str, ...]
    part: str


@dataclass(frozen=True)
class OneMatrix:
    """A stack of matrices that are one of ours, one below the other or side by side."""

    key: str
    how: Literal["below", "beside"]


Entry = (
    str | Fused | Stacked | Rows | Paired | Only | Framed | Turned | AroundOne | Runs | OneMatrix
)
KeyTable = Mapping[str, tuple[Entry, ...]]

LAYER = "model.layers.{layer}"
# Names that tell what made them, and what to do about it.
ORIGINS = {
    r"\.lora_|\.base_layer\.|\.original_module\.": "an adapter is beside its weights: "
    "merge it (peft's merge_and_unload), and save the model",
    r"\.switch_mlp\.": "these are mlx-lm's names: take the Hugging Face model it was made from",
    r"^tok_embeddings\.|^layers\.\d+\.attention\.w[qkvo]\.": "these are names of Meta's or "
    "Mistral's own layout: take the model's Hugging Face form",
    r"^blk\.\d+\.|^token_embd\.": "these are GGUF's names: take the model's Hugging Face form",
}


def find_tensors(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], table: KeyTable
) -> dict[WeightName, TensorSource]:
    """A source for every tensor that `spec` needs, out of the checkpoint's keys, with their
    `shapes`. Of forms that go by one name the first is taken whose shape fits.

    A tied head takes whichever of the two tensors is stored, each its own when both are:
    transformers does not tie stored tensors that differ (`tie_weights`). Raises UserError naming
    the keys that are missing.
    """
    if spec.head.tied:
        embed, head = table[str(EMBEDDING)], table[str(HEAD)]
        table = {**table, str(EMBEDDING): embed + head, str(HEAD): head + embed}
    sources: dict[WeightName, TensorSource] = {}
    missing: dict[WeightName, str] = {}  # the checkpoint's name by ours
    for name, weight in spec.weights():
        alternatives = places(spec, name, weight, table)
        stored = [source for source in alternatives if source.key in shapes]
        fitting = (source for source in stored if shapes.get(source.key) == source.stored_shape)
        if not stored:
            missing[name] = alternatives[0].key
        else:
            sources[name] = next(fitting, stored[0])
    if missing:
        raise _missing(missing, {source.key for source in sources.values()}, shapes)
    return sources


def places(
    spec: ModelSpec, name: WeightName, weight: Weight, table: KeyTable
) -> list[TensorSource]:
    """Where one of our tensors may lie in a checkpoint, form by form."""
    return [_source(spec, name, weight, entry) for entry in table[name.template]]


def _missing(
    missing: Mapping[WeightName, str], used: Collection[str], names: Collection[str]
) -> UserError:
    """The error for tensors that are not there: what is in their place, and what that tells."""
    rest = [name for name in names if name not in used]
    telling = [do for pattern, do in ORIGINS.items() if any(re.search(pattern, n) for n in rest)]
    origin = telling[0] if telling else ""
    prefixes = sorted(decoder_prefixes(names))
    if not origin and list(missing) == [HEAD]:
        origin = (
            "if the head shares the embedding's weights, set tie_word_embeddings to true in "
            "config.json; else the model has no head, as one that embeds texts"
        )
    if not origin and len(prefixes) > 1:
        origin = (
            f"it holds more than one decoder, under {', '.join(map(repr, prefixes))}: save "
            "the one you want alone"
        )
    return UserError(
        f"the checkpoint lacks {counted(len(missing), 'tensor')} that its config.json implies: "
        f"{listed(missing.values())}",
        f"{listed(rest)} in their place" if rest else f"the other {counted(len(names), 'tensor')}",
        origin or "download it again, or take the config.json that belongs to it",
    )


def _source(spec: ModelSpec, name: WeightName, weight: Weight, entry: Entry) -> TensorSource:
    numbers = _numbers(spec, name)
    scale = spec.multiplier(weight.fold, name.layer, name.part)
    if isinstance(entry, str):
        return TensorSource(name, entry.format(**numbers), weight.shape, scale=scale, weight=weight)
    if isinstance(entry, Only):
        key, whole = entry.key.format(**numbers), (entry.of, *weight.shape)
        return TensorSource(name, key, whole, index=0, scale=scale, weight=weight)
    if isinstance(entry, Framed):
        key, whole = entry.key.format(**numbers), (1,) * entry.before + weight.shape
        return TensorSource(name, key, whole + (1,) * entry.after, scale=scale, weight=weight)
    if isinstance(entry, Turned):
        key, turned_shape = entry.key.format(**numbers), weight.shape[::-1]
        return TensorSource(name, key, turned_shape, transpose=True, scale=scale, weight=weight)
    if isinstance(entry, AroundOne):
        key = entry.key.format(**numbers)
        return TensorSource(name, key, weight.shape, scale=scale, weight=weight, offset=1.0)
    if isinstance(entry, OneMatrix):
        return _one_matrix_source(spec, name, weight, entry)
    if isinstance(entry, Runs):
        return _run_source(spec, name, weight, entry)
    if isinstance(entry, Stacked):
        return _stacked_source(spec, name, weight, entry)
    assert name.layer is not None
    layer, rows, key = spec.layers[name.layer], weight.shape[0], entry.key.format(**numbers)
    if isinstance(entry, Paired):
        pairs = int(getattr(layer.mixer, entry.heads))
        return TensorSource(name, key, weight.shape, scale=scale, weight=weight, pairs=pairs)
    stored: tuple[int, ...] = (entry.parts * rows, *weight.shape[1:])
    run = None if entry.parts == 1 else (entry.part * rows, (entry.part + 1) * rows)
    columns: tuple[int, int, int] | None = None
    index = None
    turned = isinstance(entry, Fused) and entry.transposed and len(stored) == 2
    if isinstance(entry, Fused):
        assert isinstance(layer.ffn, MoeSpec)
        stored = (layer.ffn.router.experts, *(stored[::-1] if turned else stored))
        index = name.expert
        if entry.interleaved and run:
            columns, run = (entry.part, entry.parts * rows, entry.parts), None
        elif turned and run:
            columns, run = (*run, 1), None
    return TensorSource(
        name,
        key,
        stored,
        index=index,
        rows=run,
        transpose=turned,
        scale=scale,
        weight=weight,
        columns=columns,
    )


def _numbers(spec: ModelSpec, name: WeightName) -> dict[str, int | None]:
    """What stands for the names in braces in a key."""
    if name.layer is None:
        return {}
    layer = spec.layers[name.layer]
    number, half = layer.stored or (name.layer, None)
    return {"layer": number, "half": half, "expert": name.expert, "group": layer.router_group}


def _stacked_source(
    spec: ModelSpec, name: WeightName, weight: Weight, entry: Stacked
) -> TensorSource:
    assert name.layer is not None and name.expert is not None
    ffn = spec.layers[name.layer].ffn
    assert isinstance(ffn, MoeSpec)
    rows, columns = weight.shape[::-1] if entry.transposed else weight.shape
    return TensorSource(
        name,
        entry.key.format(**_numbers(spec, name)),
        (ffn.router.experts * rows, columns),
        rows=(name.expert * rows, (name.expert + 1) * rows),
        transpose=entry.transposed,
        scale=spec.multiplier(weight.fold, name.layer, name.part),
        weight=weight,
    )


def _one_matrix_source(
    spec: ModelSpec, name: WeightName, weight: Weight, entry: OneMatrix
) -> TensorSource:
    assert name.layer is not None
    count = int(getattr(spec.layers[name.layer].mixer, "experts", 1))
    rows, columns = weight.shape
    below = entry.how == "below"
    return TensorSource(
        name,
        entry.key.format(**_numbers(spec, name)),
        (count, rows // count, columns) if below else (count, rows, columns // count),
        scale=spec.multiplier(weight.fold, name.layer, name.part),
        weight=weight,
        stack=entry.how,
    )


def _run_source(spec: ModelSpec, name: WeightName, weight: Weight, entry: Runs) -> TensorSource:
    assert name.layer is not None
    mixer = spec.layers[name.layer].mixer
    sizes = {part: int(getattr(mixer, part)) for part in entry.of}
    first = sum(sizes[part] for part in entry.of[: entry.of.index(entry.part)])
    size, own = sum(sizes.values()), sizes[entry.part]
    paired = entry.part == "rotated" and bool(getattr(mixer, "interleaved", False))
    return TensorSource(
        name,
        entry.key.format(**_numbers(spec, name)),
        (weight.shape[0] // own * size, *weight.shape[1:]),
        scale=spec.multiplier(weight.fold, name.layer, name.part),
        weight=weight,
        runs=(size, first, first + own),
        pairs=own if paired else 0,
    )


SKELETON: KeyTable = {
    "embed.weight": ("model.embed_tokens.weight",),
    "head.norm.weight": ("model.norm.weight",),
    "head.rows.weight": ("lm_head.weight",),
    "head.rows.bias": ("lm_head.bias",),
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


def expert_keys(*forms: dict[str, Entry], kind: str = "weight") -> KeyTable:
    """The experts, in the `forms` in which they may be stored: each says where gate, up and down
    are. `kind`: weight or bias."""
    return {
        f"layers.{{layer}}.ffn.experts.{{expert}}.{name}.{kind}": tuple(
            form[name] for form in forms
        )
        for name in ("gate", "up", "down")
    }


def each_expert(prefix: str, gate: str, up: str, down: str) -> dict[str, Entry]:
    """Experts stored one by one, under these names."""
    names = {"gate": gate, "up": up, "down": down}
    return {name: f"{LAYER}.{prefix}.{{expert}}.{theirs}.weight" for name, theirs in names.items()}


def stacked_pairs(prefix: str) -> dict[str, Entry]:
    """Experts stored one by one, each with gate and up in one `gate_up_proj` [2 * width, d]."""
    one = f"{LAYER}.{prefix}.{{expert}}"
    return {
        "gate": Rows(f"{one}.gate_up_proj", 0, 2),
        "up": Rows(f"{one}.gate_up_proj", 1, 2),
        "down": f"{one}.down_proj",
    }


def fused_experts(
    gate_up: str, down: str, transposed: bool = False, interleaved: bool = False
) -> dict[str, Entry]:
    """Experts stacked in `gate_up` [experts, 2 * width, d] and `down` [experts, d, width], or with
    the last two axes changed."""
    return {
        "gate": Fused(f"{LAYER}.{gate_up}", 0, 2, transposed, interleaved),
        "up": Fused(f"{LAYER}.{gate_up}", 1, 2, transposed, interleaved),
        "down": Fused(f"{LAYER}.{down}", transposed=transposed),
    }


def chunks(names: str, ours: str, theirs: str) -> KeyTable:
    """Matrices of a layer, `names` of one letter or more apart by spaces, that are equal runs of
    rows of one stored tensor."""
    parts = names.split()
    return {
        f"layers.{{layer}}.{ours}.{name}.weight": (Rows(f"{LAYER}.{theirs}", part, len(parts)),)
        for part, name in enumerate(parts)
    }


# How transformers 4 and 5 store the experts of most families.
MLP_EXPERTS = expert_keys(
    each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    fused_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)

# What DeepSeek-V3's router, experts and shared expert are called, in many families.
DEEPSEEK_MOE: KeyTable = {
    "layers.{layer}.ffn.router.weight": (f"{LAYER}.mlp.gate.weight",),
    "layers.{layer}.ffn.router.choice_bias": (f"{LAYER}.mlp.gate.e_score_correction_bias",),
    **MLP_EXPERTS,
    **mlp_keys("ffn.shared", "mlp.shared_experts"),
}
DEEPSEEK_FFN: KeyTable = {**DEEPSEEK_MOE, **mlp_keys("ffn.mlp", "mlp")}


def paired_queries() -> KeyTable:
    """Queries and keys whose neighbouring channels are rotated together."""
    return {
        f"layers.{{layer}}.attn.{name}.{kind}": (Paired(f"{LAYER}.self_attn.{name}_proj.{kind}"),)
        for name in "qk"
        for kind in ("weight", "bias")
    }


def also_under(table: KeyTable, own: str, other: str) -> KeyTable:
    """A table whose tensors may have `other` in the place of `own` in their names."""

    def moved(entry: Entry) -> Entry:
        if isinstance(entry, str):
            return entry.replace(own, other)
        return replace(entry, key=entry.key.replace(own, other))

    return {
        ours: tuple(dict.fromkeys((*map(moved, entries), *entries)))
        for ours, entries in table.items()
    }


def norm_biases(table: KeyTable) -> KeyTable:
    """The biases beside the norms of a table."""
    return {
        ours.replace("norm.weight", "norm.bias"): tuple(
            entry.replace("norm.weight", "norm.bias") for entry in entries if isinstance(entry, str)
        )
        for ours, entries in table.items()
        if ours.endswith(".norm.weight")
    }
