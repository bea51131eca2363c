"""The families: one file per Hugging Face `model_type`, which says what the architecture is and where its tensors lie.

The folder is the registry: every module but the shared `PARTS` is a family.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from ane_moe.checkpoint import Checkpoint, TensorSource
from ane_moe.errors import UserError
from ane_moe.families.config import Config
from ane_moe.spec import ModelSpec

PARTS = {"config", "decoder", "keys", "rope"}


class Family(Protocol):
    """What a family's module offers."""

    def spec(self, config: Config) -> ModelSpec:
        """The architecture; UserError for a field that is missing or asks for other maths."""

    def tensors(self, spec: ModelSpec, names: Collection[str]) -> dict[str, TensorSource]:
        """Where each of our tensors (tensors.tensor_shapes) lies among the checkpoint's `names`; UserError if not."""


def supported() -> list[str]:
    """The supported model types."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in PARTS)


def load_family(model_type: str) -> Family:
    """The family of one `model_type`; UserError, naming the supported ones, when there is none."""
    if model_type not in supported():
        raise UserError(f"model_type {model_type!r} is not supported", do=f"supported: {', '.join(supported())}")
    return cast(Family, import_module(f"{__name__}.{model_type}"))


def describe_config(values: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The architecture that a config.json describes; `where` names the file in errors.

    Raises UserError for everything that can be wrong without looking at tensors, quantised weights
    included.
    """
    config = Config(dict(values), where)
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str):
        raise config.missing("model_type")
    family = load_family(model_type)
    if method := config.values.get("quantization_config"):
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        do = "supported: F16, BF16 and F32 weights; dequantise it first"
        raise UserError(f"{where} is quantised ({name})", do=do)
    return family.spec(config)


def describe(checkpoint: Checkpoint) -> tuple[ModelSpec, dict[str, TensorSource]]:
    """A checkpoint's architecture, and the source of each of our tensors: names, shapes and dtypes all checked.

    Raises UserError for everything about the checkpoint that can be wrong without reading its weights.
    """
    # `generate` takes its stop tokens from generation_config.json where there is one.
    ids = {key: value for key, value in checkpoint.generation.items() if key in ("bos_token_id", "eos_token_id")}
    spec = describe_config(checkpoint.config | ids, str(checkpoint.folder / "config.json"))
    sources = load_family(spec.family).tensors(spec, checkpoint.tensors)
    checkpoint.require(sources)
    return spec, sources
