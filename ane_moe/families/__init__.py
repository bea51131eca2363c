"""The families: one file per Hugging Face `model_type`, which says what the architecture is and
where its tensors lie.

The folder is the registry: every module but the shared `PARTS` is a family.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from ane_moe.checkpoints.checkpoint import Checkpoint, TensorSource
from ane_moe.checkpoints.folder import CONFIG, passed_over
from ane_moe.checkpoints.packed.facts import quantisation_facts, side_facts
from ane_moe.errors import UserError
from ane_moe.families.config import Config
from ane_moe.families.keys import KeyTable, find_tensors
from ane_moe.families.missing import nearest
from ane_moe.families.quantised import described, is_read, quantisation
from ane_moe.families.taps import Taps
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import WeightName

PARTS = {
    "adapters",
    "approximate",
    "config",
    "decoder",
    "keys",
    "missing",
    "quantised",
    "rope",
    "taps",
}

# Families of papers whose models are not public; each has `published`.
PAPERS = ("afm", "mm1_moe", "omni_moe", "pt_moe")

READABLE = (
    "supported: F16, BF16 and F32 weights, FP8, MXFP4, NVFP4, compressed-tensors, GPTQ, AWQ, "
    "bitsandbytes 4 bit and MLX; take the model it was made from, or dequantise it first"
)


class Family(Protocol):
    """What a family's module offers: `KEYS` says what our tensors (`ModelSpec.weights`) are called
    in a checkpoint, `TAPS` where Hugging Face's model has what goldens keep. It may have `BESIDE`,
    what `beside` gives, and `as_stored(spec, names)`, the architecture of a checkpoint that may
    lack tensors which transformers does without."""

    KEYS: KeyTable
    TAPS: Taps

    def spec(self, config: Config) -> ModelSpec:
        """The architecture; UserError for a field that is missing or asks for other maths."""


def supported() -> list[str]:
    """The supported model types."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in PARTS)


def load_family(model_type: str) -> Family:
    """The family of one `model_type`; UserError when there is none, naming the supported ones, the
    nearest of them and what that lacks."""
    if model_type not in supported():
        raise UserError(
            f"model_type {model_type!r} is not supported",
            nearest(model_type),
            f"supported: {', '.join(supported())}",
        )
    return cast(Family, import_module(f"{__name__}.{model_type}"))


def published(name: str) -> dict[str, Any] | None:
    """The configuration of a paper's model by its name, such as `pt-6b-d4`; None where no paper
    has it."""
    found = (import_module(f"{__name__}.{family}").published(name) for family in PAPERS)
    return next(filter(None, found), None)


def beside(model_type: str) -> Mapping[str, str]:
    """Patterns of tensors that the files of a family have and nobody reads, by what they are."""
    return getattr(load_family(model_type), "BESIDE", {})


def describe_config(values: Mapping[str, Any], where: str = CONFIG) -> ModelSpec:
    """The architecture that a config.json describes; `where` names the file in errors.

    Raises UserError for everything that can be wrong without looking at tensors, quantised weights
    included.
    """
    config = Config(dict(values), where)
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str):
        raise config.missing("model_type")
    family = load_family(model_type)
    if (form := quantisation(config.values)) and not is_read(form):
        raise _quantised(where, form)
    return family.spec(config)


def describe(
    checkpoint: Checkpoint, ignore: Collection[str] = ()
) -> tuple[ModelSpec, dict[WeightName, TensorSource]]:
    """A checkpoint's architecture, and the source of each of our tensors: names, shapes and dtypes
    all checked.

    `ignore` are patterns (as in a shell) of tensors that may be left over. Raises UserError for
    everything about the checkpoint that can be wrong without reading its weights.
    """
    folder, where = checkpoint.folder, str(checkpoint.config_file)
    # `generate` takes its stop tokens from generation_config.json where there is one.
    ids = {
        key: value
        for key, value in checkpoint.generation.items()
        if key in ("bos_token_id", "eos_token_id")
    }
    if form := quantisation(checkpoint.config):
        raise _quantised(where, form)
    spec = describe_config(checkpoint.config | ids, where)
    if not checkpoint.forms and (said := side_facts(folder)):
        raise _quantised(folder, described(quantisation_facts({}, said)))
    family = load_family(spec.family)
    if hasattr(family, "as_stored"):
        spec = family.as_stored(spec, checkpoint.tensors)
    if hasattr(family, "as_read"):
        spec = family.as_read(spec, checkpoint)
    try:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        sources = find_tensors(spec, shapes, family.KEYS)
        checkpoint.require(sources, ignore, beside(spec.family))
    except UserError as error:
        if form := quantisation({}, checkpoint.tensors):
            raise _quantised(folder, form) from None
        if shards := passed_over(folder):
            do = "; ".join(filter(None, (shards, error.do)))
            raise UserError(error.what, error.found, do) from None
        raise
    return spec, sources


def _quantised(what: Path | str, form: str) -> UserError:
    return UserError(f"{what} is quantised ({form})", do=READABLE)
