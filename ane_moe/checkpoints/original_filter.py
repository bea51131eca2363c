"""OpenAI's privacy filter as it was first stored (`original/` in its repository): queries, keys and
values in one tensor, sinks as powers of 2, and names of its own. Read as transformers has it.

Source: transformers' convert_openai_privacy_filter_weights_to_hf.py.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ane_moe.checkpoints.safetensors_header import DTYPE_BITS
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.errors import UserError

MARK = "block.0.attn.qkv.weight"
HEAD, BIAS = "unembedding.weight", "score.bias"
QKV = re.compile(r"block\.(\d+)\.attn\.qkv\.(weight|bias)")
SINKS = re.compile(r"block\.(\d+)\.attn\.sinks")
LAYER = re.compile(r"block\.(\d+)\.(.+)")
WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    HEAD: "score.weight",
    "unembedding.bias": BIAS,
}
OF_LAYER = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.swiglu.weight": "mlp.experts.gate_up_proj",
    "mlp.swiglu.bias": "mlp.experts.gate_up_proj_bias",
    "mlp.out.weight": "mlp.experts.down_proj",
    "mlp.out.bias": "mlp.experts.down_proj_bias",
}
KINDS = (
    "account_number",
    "private_address",
    "private_date",
    "private_email",
    "private_person",
    "private_phone",
    "private_url",
    "secret",
)
LABELS = ("O", *(f"{place}-{kind}" for kind in KINDS for place in "BIES"))
# Fields by their names there.
SAME_MEANING = {
    "bidirectional_left_context": "sliding_window",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
END_OF_TEXT = 199_999  # in o200k_base


def is_original(tensors: Mapping[str, StoredTensor]) -> bool:
    return MARK in tensors


def native_config(
    config: dict[str, Any], tensors: Mapping[str, StoredTensor], where: str
) -> dict[str, Any]:
    """transformers' config.json of the same model. Raises UserError where a token sees more on one
    side of it than on the other."""
    sides = [config.get(f"bidirectional_{side}_context") for side in ("left", "right")]
    if sides[0] != sides[1]:
        raise UserError(f"{where}: a token sees as far to the left as to the right", repr(sides))
    rope = {
        "rope_type": "yarn",
        "rope_theta": config.get("rope_theta"),
        "factor": config.get("rope_scaling_factor"),
        "beta_fast": config.get("rope_ntk_beta"),
        "beta_slow": config.get("rope_ntk_alpha"),
        "truncate": False,
        "original_max_position_embeddings": config.get("initial_context_length"),
    }
    count = tensors[HEAD].shape[0] if HEAD in tensors else 0
    labels = LABELS if count == len(LABELS) else [f"LABEL_{number}" for number in range(count)]
    vocab = config.get("vocab_size")
    end = END_OF_TEXT if isinstance(vocab, int) and vocab > END_OF_TEXT else None
    built_in = {
        "model_type": "openai_privacy_filter",
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": end,
        "eos_token_id": end,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "rope_parameters": rope,
    }
    named = {SAME_MEANING.get(name, name): value for name, value in config.items()}
    return {name: value for name, value in named.items() if name != "rope_theta"} | built_in


def native_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors by transformers' names; unknown ones keep theirs. Where there is no bias for the
    labels, it is as many zeros."""
    native: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        native |= dict(_native(config, name, tensor))
    if BIAS not in native and HEAD in tensors:
        head = tensors[HEAD]
        count, size = head.shape[0], head.shape[0] * DTYPE_BITS[head.dtype] // 8
        zeros = replace(head, key="no bias", shape=(count,), size=size, scale=0.0, made=True)
        native[BIAS] = zeros
    return native


def _native(
    config: Mapping[str, Any], name: str, tensor: StoredTensor
) -> Iterator[tuple[str, StoredTensor]]:
    layer = LAYER.fullmatch(name)
    if found := QKV.fullmatch(name):
        first = 0
        for letter, rows in zip("qkv", _rows(config), strict=True):
            key = f"model.layers.{found[1]}.self_attn.{letter}_proj.{found[2]}"
            yield key, _run(tensor, first, rows, f"{name}, {letter}")
            first += rows
    elif found := SINKS.fullmatch(name):
        sinks = replace(tensor, scale=math.log(2), made=True)
        yield f"model.layers.{found[1]}.self_attn.sinks", sinks
    elif layer and layer[2] in OF_LAYER:
        yield f"model.layers.{layer[1]}.{OF_LAYER[layer[2]]}", tensor
    else:
        yield WHOLE.get(name, name), tensor


def _rows(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of queries, keys and values; the family says what is wrong with other numbers."""
    sizes = (config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    heads, kv_heads, head = (
        value if isinstance(value, int) and value > 0 else 1
        for value in (*sizes, config.get("head_dim"))
    )
    return heads * head, kv_heads * head, kv_heads * head


def _run(tensor: StoredTensor, first: int, rows: int, key: str) -> StoredTensor:
    """Rows of a tensor as a tensor of its own; fewer where it has no more."""
    rows = max(0, min(rows, tensor.shape[0] - first))
    row = math.prod(tensor.shape[1:]) * DTYPE_BITS[tensor.dtype] // 8
    return replace(
        tensor,
        key=key,
        shape=(rows, *tensor.shape[1:]),
        offset=tensor.offset + first * row,
        size=rows * row,
        made=True,
    )
