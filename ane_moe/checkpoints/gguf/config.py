"""config.json of a GGUF file's model, out of its metadata."""

from collections.abc import Collection, Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np

from ane_moe.checkpoints.gguf.architectures import ARCHITECTURES, Architecture
from ane_moe.checkpoints.gguf.header import GgufFile
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError
from ane_moe.wording import listed

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_BASE = 10_000.0  # llama.cpp's own, where a file gives none
# Fields of `rope_parameters` by their metadata.
ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
UNSCALED = ("none", "default")
OF_HEAD = ("attention.value_length", "rope.dimension_count")  # as wide as a head's keys
AGREEING = {"attention.causal": True, "rope.scaling.yarn_ext_factor": 1.0}
NO_PART = ("rope.scaling.finetuned",)  # of what is computed
MOST = 4096  # of numbers that are given for each layer
TOKENS = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # after which llama.cpp stops


def architecture_of(file: GgufFile) -> Architecture:
    """Raises UserError for one that is not known."""
    name = file.metadata.get("general.architecture")
    known = ", ".join(sorted(ARCHITECTURES))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        found = repr(name)[:60]
        raise UserError(f"{file.path}: its architecture is not supported", found, f"known: {known}")
    if not np.any(file.metadata.get(f"{name}.expert_count")):
        do = "a MoE model is needed"
        raise UserError(f"{file.path}: its model has no experts", f"a dense {name}", do)
    return ARCHITECTURES[name]


def config_of(file: GgufFile, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """transformers' config.json. `tensors` are those of all parts. Raises UserError for metadata
    that would change what is computed, and have no field there."""
    known = architecture_of(file)
    start = f"{file.metadata['general.architecture']}."
    facts = {
        key.removeprefix(start): value[:MOST].tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if key.startswith(start)
    }
    config: dict[str, Any] = {"model_type": known.model_type, **known.fixed}
    config |= {field: facts[key] for key, field in known.fields.items() if key in facts}
    config |= _of_layers(config)
    if known.kinds and isinstance(layers := config.get("num_hidden_layers"), int):
        config["layer_types"] = list(islice(cycle(known.kinds), min(layers, MOST)))
    _require_known(file, known, facts, head_of(config))
    config |= _further_layers(config)
    if known.normed:
        config[known.normed] = any(name.endswith(".attn_q_norm.weight") for name in tensors)
    rope: dict[str, Any] = {"rope_theta": ROPE_BASE, "rope_type": "default"}
    rope |= {field: facts[key] for key, field in ROPE.items() if key in facts}
    if rope["rope_type"] in UNSCALED:
        rope = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    elif rope["rope_type"] == "yarn":
        rope |= known.yarn
    rotated, head = facts.get("rope.dimension_count"), head_of(config)
    if known.partial and isinstance(rotated, int) and head:
        rope["partial_rotary_factor"] = rotated / head
    config |= {field: _holds(tensors, name) for field, name in known.biases.items()}
    config |= {"rope_parameters": rope, "tie_word_embeddings": HEAD not in tensors}
    if EMBEDDING in tensors:
        config.setdefault("vocab_size", tensors[EMBEDDING].shape[0])
    return config | _ids(file.metadata)


def generation_of(file: GgufFile) -> dict[str, Any]:
    """generation_config.json: what ends a text."""
    found = (file.metadata.get(f"{TOKENS}{end}_token_id") for end in ENDS)
    ids = list(dict.fromkeys(number for number in found if isinstance(number, int)))
    return {"eos_token_id": ids} if ids else {}


def head_of(config: Mapping[str, Any]) -> int | None:
    """Channels of a head; None where the metadata do not tell."""
    sizes = [config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")]
    head, width, heads = (size if isinstance(size, int) and size > 0 else None for size in sizes)
    return head or (width // heads if width and heads else None)


def _ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{end}_token_id": metadata.get(f"{TOKENS}{end}_token_id") for end in ("bos", "eos")}


def _of_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are given for each layer, as one where they are the same in all that have any:
    a layer without heads of keys is a convolution."""
    each = {name: value for name, value in config.items() if isinstance(value, list)}
    one: dict[str, Any] = {
        name: max(values)
        for name, values in each.items()
        if all(isinstance(value, int) for value in values) and len({*values} - {0}) == 1
    }
    if "num_key_value_heads" in one and "conv_L_cache" in config:
        kinds = ("conv", "full_attention")
        one["layer_types"] = [kinds[heads > 0] for heads in each["num_key_value_heads"]]
    return one


def _further_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp counts the layers that predict further tokens among a model's."""
    layers, further = (config.get(n) for n in ("num_hidden_layers", "num_nextn_predict_layers"))
    if isinstance(layers, int) and isinstance(further, int):
        return {"num_hidden_layers": layers - further}
    return {}


def _require_known(
    file: GgufFile, known: Architecture, facts: Mapping[str, Any], head: Any
) -> None:
    agreeing = {**dict.fromkeys(OF_HEAD, head), **AGREEING, **known.agreeing}
    if known.partial and isinstance(head, int):
        agreeing["rope.dimension_count"] = facts.get("rope.dimension_count")
    for key, value in facts.items():
        if key in agreeing and not np.array_equal(value, agreeing[key]):
            raise UserError(
                f"{file.path}: {key} is not supported", str(value)[:60], f"known: {agreeing[key]}"
            )
    other = facts.keys() - agreeing.keys() - known.fields.keys() - ROPE.keys() - {*NO_PART}
    if other:
        raise UserError(
            f"{file.path}: its metadata say what is not known of {known.model_type}",
            listed(sorted(other)),
            "take the safetensors model that it was made from",
        )


def _holds(tensors: Collection[str], name: str) -> bool:
    return any(tensor.endswith(f".{name}.bias") for tensor in tensors)
