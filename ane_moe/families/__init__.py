"""The families: one file per Hugging Face `model_type`, which says what the architecture is and where its tensors lie.

The folder is the registry: every module but the shared `PARTS` is a family.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from ane_moe.checkpoint import Checkpoint, TensorSource
from ane_moe.errors import UserError
from ane_moe.families.config import Config
from ane_moe.families.keys import KeyTable, find_tensors
from ane_moe.model.weight import WeightName
from ane_moe.spec import ModelSpec

PARTS = {"config", "decoder", "keys", "rope"}


class Family(Protocol):
    """What a family's module offers: `KEYS` says what our tensors (`ModelSpec.weights`) are called in a checkpoint."""

    KEYS: KeyTable

    def spec(self, config: Config) -> ModelSpec:
        """The architecture; UserError for a field that is missing or asks for other maths."""


def supported() -> list[str]:
    """The supported model types."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in PARTS)


def load_family(model_type: str) -> Family:
    """The family of one `model_type`; UserError, naming the supported ones, when there is none."""
    if model_type not in supported():
        raise UserError(f"model_type {model_type!r} is not supported", do=f"supported: {', '.join(supported())}")
    return cast(Family, import_module(f"{__name__}.{model_type}"))


def describe(checkpoint: Checkpoint) -> tuple[ModelSpec, dict[WeightName, TensorSource]]:
    """A checkpoint's architecture, and the source of each of our tensors: names, shapes and dtypes all checked.

    Raises UserError for everything about the checkpoint that can be wrong without reading its weights.
    """
    config = Config(checkpoint.config, str(checkpoint.folder / "config.json"))
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str):
        raise config.missing("model_type")
    family = load_family(model_type)
    if method := config.values.get("quantization_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise UserError(
            f"{checkpoint.folder} is quantised ({name})", do="supported: F16, BF16 and F32 weights; dequantise it first"
        )
    # `generate` takes its stop tokens from generation_config.json where there is one.
    ids = {key: value for key, value in checkpoint.generation.items() if key in ("bos_token_id", "eos_token_id")}
    spec = family.spec(Config(config.values | ids, config.where))
    sources = find_tensors(spec, checkpoint.tensors, family.KEYS)
    checkpoint.require(sources)
    return spec, sources
