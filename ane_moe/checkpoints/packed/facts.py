"""What a checkpoint says of how it was quantised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ane_moe.json_file import read_json

# Files of ModelOpt, AutoGPTQ and AutoAWQ that say how weights were quantised, where config.json
# does not.
SIDE_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
FIELDS = ("quantization_config", "compression_config", "quantization")


def quantisation_facts(config: Mapping[str, Any], side: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json, and of the file beside it that has them in its place."""
    facts: dict[str, Any] = {}
    for values in (side, *(config.get(field) for field in reversed(FIELDS))):
        if isinstance(values, Mapping):
            facts |= values
    inner = facts.get("quantization")
    return facts | inner if isinstance(inner, dict) else facts


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with plain weights."""
    return {name: value for name, value in config.items() if name not in FIELDS}


def side_facts(folder: Path) -> dict[str, Any]:
    """What a file of SIDE_FILES says; empty without one."""
    for name, method in SIDE_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method, **read_json(folder / name)}
    return {}
