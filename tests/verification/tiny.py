"""The smallest models that still have every part, so that a test can afford its own conversion."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.conversion.pipeline import convert
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.families import describe
from ane_moe.formats.recipe import FP16
from ane_moe.model.spec import ModelSpec
from tests.models import make_model, save_checkpoint

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILY_SIZES = {
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(family: str, **overrides: object) -> PreTrainedModel:
    """One layer, four square experts (so that a transpose keeps its shape)."""
    return make_model(family, **{**SIZES, **FAMILY_SIZES[family], **overrides})


def tiny_checkpoint(family: str, folder: Path, **overrides: object) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tiny_model(family, **overrides), folder)


def tiny_conversion(checkpoint: Path, out: Path, **options: object) -> Path:
    """Decode only, unless `prefill` says otherwise."""
    golden = bool(options.pop("golden", False))
    convert(
        checkpoint, out, ConvertOptions(**{"prefill": 0, "recipe": FP16, **options}), golden=golden
    )
    return out


def describe_wrongly(patch: pytest.MonkeyPatch, change: Callable[[ModelSpec], ModelSpec]) -> None:
    """Checkpoints are described as `change` says; nobody asks about tensors that it has no use
    for."""

    def changed(checkpoint: Checkpoint, ignore: Collection[str]) -> Any:
        spec, sources = describe(checkpoint, ignore)
        return change(spec), sources

    patch.setattr("ane_moe.opened.describe", changed)
    patch.setattr(Checkpoint, "left_out", lambda *_: {})


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the stored tensors in place, whatever names they have."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
    )
