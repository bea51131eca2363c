"""Tells a quantised checkpoint by its configuration, or by tensors that only such a one has."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ane_moe.checkpoints.packed.facts import FIELDS

# Methods whose tensors are decoded (checkpoints/packed).
READ = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "bitsandbytes 4", "modelopt", "mlx")
# The end of a tensor's name, and who stores such tensors.
TENSORS = {
    r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.bitsandbytes__\w+)$": "bitsandbytes",
    r"\.g_idx$": "gptq",
    r"\.qweight$": "awq or gptq",
    r"\.weight_packed$": "compressed-tensors",
    r"\.weight_scale_2$": "NVFP4",
    r"_(blocks|scales)$": "MXFP4",
    r"(\.weight|_proj)_scale(_inv)?$": "FP8",
    r"\.weight\._(data|scale)$": "quanto",
    r"\.W_q$": "hqq",
    r"\.scales$": "mlx",
}


def quantisation(config: Mapping[str, Any], tensors: Collection[str] = ()) -> str | None:
    """What is known of the form, such as `mlx 4 bit, group 64`; None for plain weights.

    `config` is config.json; `tensors` are the names of the tensors, where they are known.
    """
    for field in FIELDS:
        if facts := config.get(field):
            facts = facts if isinstance(facts, dict) else {}
            return described(facts, is_mlx=field == "quantization")
    for pattern, name in TENSORS.items():
        if any(re.search(pattern, tensor) for tensor in tensors):
            return f"{name}, by its tensors"
    return None


def is_read(form: str) -> bool:
    """Whether the form that `quantisation` named is one whose tensors are decoded."""
    return form.startswith(READ)


def described(facts: Mapping[str, Any], is_mlx: bool = False) -> str:
    """The form of which these are the facts, in words."""
    method = facts.get("quant_method")
    if method is None:
        # mlx-lm writes its fields under both names, and gives no method.
        method = "mlx" if is_mlx or {"group_size", "bits"} <= facts.keys() else "unknown"
    four = bool(facts.get("load_in_4bit"))  # bitsandbytes has flags in place of a number
    flagged = 4 if four else 8 if facts.get("load_in_8bit") else None
    bits = next(filter(_whole, (facts.get("bits"), facts.get("w_bit"), flagged)), None)
    group = next(filter(_whole, (facts.get("group_size"), facts.get("q_group_size"))), None)
    fields = ("quant_algo", "format", "mode", *(["bnb_4bit_quant_type"] if four else []))
    forms = [facts[field][:40] for field in fields if isinstance(facts.get(field), str)]
    usual = ("affine", method)  # say nothing that is not said already
    name = f"{str(method)[:40]} {bits} bit" if bits else str(method)[:40]
    further = [form for form in forms if form not in usual] + ([f"group {group}"] if group else [])
    return ", ".join([name, *further])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
