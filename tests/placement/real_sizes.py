"""Shards of real models without their weights: the graphs are real, the weight files are holes."""

import math
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.plan import ConversionPlan, ConvertOptions, ShardPlan
from ane_moe.conversion.planner import make_plan
from ane_moe.emit.coreml.package import MODEL, WEIGHTS, _bound, _item_manifest, _Place
from ane_moe.emit.coreml.tracing import make_template
from ane_moe.families import load_family
from ane_moe.families.config import Config
from ane_moe.formats.recipe import FP16
from ane_moe.mlprogram.blob import ALIGNMENT, HEADER, METADATA, SENTINEL, VERSION
from ane_moe.model.template_key import TemplateKey

FP16_CODE = 1
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
        },
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
            "max_position_embeddings": 4096,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "vocab_size": 151936,
            "max_position_embeddings": 8192,
            "mlp_only_layers": [],
        },
    ),
    "granite-3.1-3b-a800m": (
        "granitemoe",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 1,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "intermediate_size": 512,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "vocab_size": 49155,
            "max_position_embeddings": 131072,
        },
    ),
}


def plan_of(model: str, **options: Any) -> ConversionPlan:
    """One layer and the head of a real model."""
    family, fields = CONFIGS[model]
    config = AutoConfig.for_model(family, **fields).to_dict()
    spec = load_family(family).spec(Config(config, model))
    sources = {
        name: TensorSource(name, str(name), row.shape, weight=row) for name, row in spec.weights()
    }
    return make_plan(spec, sources, ConvertOptions(**{"recipe": FP16, **options}))


def distinct_shards(plan: ConversionPlan) -> list[ShardPlan]:
    """One shard of each graph."""
    return list({tuple(shard.graphs.items()): shard for shard in plan.shards}.values())


def write_hollow(shard: ShardPlan, folder: Path) -> Path:
    """The shard's package, its weights never stored."""
    (key,) = shard.graphs.values()
    return write_graph(key, folder / shard.path)


def write_graph(key: TemplateKey, path: Path) -> Path:
    """A package of one graph, its weights never stored."""
    template = make_template(key)
    (path / WEIGHTS).parent.mkdir(parents=True)
    offsets = _hollow_blob(template.weights, path / WEIGHTS)
    places = {name: _Place(offset) for name, offset in offsets.items()}
    (path / MODEL).write_bytes(_bound({"": template}, places).SerializeToString())
    (path / "Manifest.json").write_text(_item_manifest("hollow"))
    return path


def _hollow_blob(shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, int]:
    offsets, end = {}, ALIGNMENT
    with path.open("wb") as stream:
        stream.write(HEADER.pack(len(shapes), VERSION))
        for name, shape in shapes.items():
            offsets[name], nbytes = end, 2 * math.prod(shape)
            stream.seek(end)
            stream.write(METADATA.pack(SENTINEL, FP16_CODE, nbytes, end + METADATA.size, 0))
            end += METADATA.size + math.ceil(nbytes / ALIGNMENT) * ALIGNMENT
    os.truncate(path, end)
    return offsets
