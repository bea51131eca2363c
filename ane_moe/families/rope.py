"""Rotary tables from a config: frequencies and attention factor, as transformers'
ROPE_INIT_FUNCTIONS compute them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ane_moe.families.config import Config
from ane_moe.model.spec import RopeSpec

BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's own constants, for files that do not give others


def rope_config(config: Config) -> Config:
    """The rotary fields in one place and under their new names.

    Files of transformers 5 have `rope_parameters`; older ones `rope_theta` at the top and
    `rope_scaling`, in which the type was first called `type`. Precedence is that of transformers'
    `RotaryEmbeddingConfigMixin`.
    """
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    given = config.values.get(name) or {}
    if not isinstance(given, dict):
        raise config.wrong(name, "an object")

    def top(*fields: str) -> dict[str, Any]:
        return {field: config.values[field] for field in fields if config.has(field)}

    fields = (
        top("rope_theta", "partial_rotary_factor") | given | top("original_max_position_embeddings")
    )
    return Config(
        fields | {"rope_type": given.get("rope_type", given.get("type", "default"))}, config.where
    )


def rope_spec(rope: Config, rotated: int) -> RopeSpec:
    """The table that rotates `rotated` channels of each head, from the fields of `rope_config`.

    Raises UserError for a rope type other than those of `TYPES`.
    """
    rope.only("rope_type", *TYPES)
    if rotated % 2:
        raise rope.wrong("rope_type", f"an even number of rotated channels, not {rotated}")
    frequencies = rope.number("rope_theta") ** -(np.arange(0, rotated, 2) / rotated)
    inv_freq, attention_factor = TYPES[rope.values["rope_type"]](rope, frequencies)
    return RopeSpec(tuple(map(float, inv_freq.astype(np.float32))), attention_factor)


def _default(rope: Config, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _linear(rope: Config, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    return frequencies / rope.number("factor"), 1.0


def _llama3(rope: Config, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    """Slow rotations (per original context, below `low`) are interpolated, fast ones kept, those
    between blended."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    turns = rope.integer("original_max_position_embeddings") * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low or 1e-9), 0, 1)  # Llama 4 has nothing between
    return frequencies * (kept + (1 - kept) / rope.number("factor")), 1.0


def _yarn(rope: Config, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    """https://arxiv.org/abs/2309.00071: a ramp over the channels between `beta_fast` and
    `beta_slow` rotations."""
    context, factor = rope.integer("original_max_position_embeddings"), rope.number("factor")
    theta = rope.number("rope_theta")

    def channel(turns: float) -> float:
        return len(frequencies) * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    low = channel(rope.number("beta_fast") if rope.has("beta_fast") else BETA_FAST)
    high = channel(rope.number("beta_slow") if rope.has("beta_slow") else BETA_SLOW)
    if rope.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
    slow = np.clip((np.arange(len(frequencies)) - low) / (high - low or 0.001), 0, 1)
    return frequencies * (1 - slow + slow / factor), _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: Config, factor: float) -> float:
    if rope.has("attention_factor"):
        return rope.number("attention_factor")

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        over = mscale(factor, rope.number("mscale_all_dim"))
        return mscale(factor, rope.number("mscale")) / over
    return mscale(factor, 1)


def mscale(factor: float, weight: float) -> float:
    """What YaRN multiplies attention by where a context grows by `factor`."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _proportional(rope: Config, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    """Gemma 4: all pairs have their places in the table; those beyond the factor do not turn."""
    factor = rope.number("partial_rotary_factor") if rope.has("partial_rotary_factor") else 1.0
    turning = np.arange(len(frequencies)) < int(factor * 2 * len(frequencies) // 2)
    scale = rope.number("factor") if rope.has("factor") else 1.0
    return np.where(turning, frequencies / scale, 0.0), 1.0


TYPES: dict[str, Callable[[Config, np.ndarray], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}
