"""Every weight compression of coremltools, on a small decoder: what we execute is what it
decompresses to."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from ane_moe.coreml_tools import ct
from ane_moe.runtime import load_package

# Expanding a weight in fp32 and rounding once can differ from coremltools' fp16 arithmetic by one
# fp16 step.
TOLERANCE = 5e-3  # largest difference, relative to the largest logit

tools = ct.optimize.coreml
IDS = np.arange(3, 11, dtype=np.int32)[None]


def palettize(**options: object) -> tuple[Callable, object]:
    return tools.palettize_weights, tools.OpPalettizerConfig(weight_threshold=0, **options)


def quantize(**options: object) -> tuple[Callable, object]:
    return tools.linear_quantize_weights, tools.OpLinearQuantizerConfig(
        weight_threshold=0, **options
    )


def prune(**options: object) -> tuple[Callable, object]:
    return tools.prune_weights, tools.OpMagnitudePrunerConfig(weight_threshold=0, **options)


def prune_small() -> tuple[Callable, object]:
    return tools.prune_weights, tools.OpThresholdPrunerConfig(threshold=0.02, weight_threshold=0)


GROUPED = {"granularity": "per_grouped_channel"}
CASES: dict[str, tuple[str, list[tuple[Callable, object]]]] = {
    **{f"lut{bits}_ios16": ("ios16", [palettize(nbits=bits)]) for bits in (1, 2, 4, 6, 8)},
    "lut_unique_ios16": ("ios16", [palettize(mode="uniform", nbits=4)]),
    "lut3_ios18": ("ios18", [palettize(nbits=3)]),
    "lut4_groups_of_output": (
        "ios18",
        [palettize(nbits=4, group_size=8, channel_axis=0, **GROUPED)],
    ),
    "lut4_groups_of_input": (
        "ios18",
        [palettize(nbits=4, group_size=8, channel_axis=1, **GROUPED)],
    ),
    "lut2_per_channel": ("ios18", [palettize(nbits=2, group_size=1, **GROUPED)]),
    "lut4_channel_scale": ("ios18", [palettize(nbits=4, enable_per_channel_scale=True)]),
    "lut4_vector2": ("ios18", [palettize(nbits=4, cluster_dim=2)]),
    "lut4_vector4_groups": ("ios18", [palettize(nbits=4, cluster_dim=4, group_size=16, **GROUPED)]),
    "int8_symmetric_ios16": ("ios16", [quantize(mode="linear_symmetric")]),
    "uint8_affine_ios16": ("ios16", [quantize(mode="linear", dtype="uint8")]),
    "int8_tensor": ("ios18", [quantize(granularity="per_tensor")]),
    "int8_channel": ("ios18", [quantize(granularity="per_channel", mode="linear")]),
    "int4_block": ("ios18", [quantize(dtype="int4", granularity="per_block", block_size=8)]),
    "uint4_block_affine": (
        "ios18",
        [quantize(dtype="uint4", mode="linear", granularity="per_block", block_size=16)],
    ),
    "sparse_ios16": ("ios16", [prune(target_sparsity=0.6)]),
    "sparse_threshold": ("ios18", [prune_small()]),
    "sparse_blocks": ("ios18", [prune(target_sparsity=0.5, block_size=2)]),
    "sparse_n_of_m": ("ios18", [prune(n_m_ratio=(2, 4))]),
    "sparse_then_lut": ("ios18", [prune(target_sparsity=0.5), palettize(nbits=4)]),
    # coremltools 9 fails to palettize a sparse weight by vectors.
    "sparse_then_grouped_lut": (
        "ios18",
        [prune(target_sparsity=0.5), palettize(nbits=4, group_size=8, **GROUPED)],
    ),
    "sparse_then_int8": ("ios18", [prune(target_sparsity=0.5), quantize()]),
    "sparse_then_int4_block": (
        "ios18",
        [prune(target_sparsity=0.5), quantize(dtype="int4", granularity="per_block", block_size=8)],
    ),
    "lut_then_int8_palette": ("ios18", [palettize(nbits=4), quantize(granularity="per_tensor")]),
}


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
                attn_implementation="eager",
            )
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        mask = torch.full((tokens, tokens), -1e4).triu(1)[None, None]
        positions = torch.arange(tokens)[None]
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, object]:
    """The decoder uncompressed, by target."""
    torch.set_num_threads(1)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(
            Decoder().eval(), torch.from_numpy(IDS).long(), strict=False, check_trace=False
        )
        return {
            name: ct.convert(
                traced,
                inputs=[ct.TensorType("ids", IDS.shape, np.int32)],
                outputs=[ct.TensorType("logits")],
                minimum_deployment_target=target,
                compute_precision=ct.precision.FLOAT16,
                skip_model_load=True,
            )
            for name, target in (("ios16", ct.target.iOS16), ("ios18", ct.target.iOS18))
        }


def logits(model: object, path: Path) -> np.ndarray:
    model.save(str(path))  # type: ignore[attr-defined]
    return (
        load_package(path, runtime="reference").predict({"ids": IDS})["logits"].astype(np.float64)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_compressed_decoder_equals_its_decompressed_self(
    case: str, plain: dict, tmp_path: Path
) -> None:
    target, steps = CASES[case]
    model = plain[target]
    with warnings.catch_warnings(action="ignore"):
        for index, (compress, config) in enumerate(steps):
            joint = {"joint_compression": True} if index else {}
            model = compress(model, tools.OptimizationConfig(global_config=config), **joint)
        decompressed = tools.decompress_weights(model)
    used = {
        op.op_type
        for op in model._mil_program.functions["main"].operations
        if op.op_type.startswith("constexpr_")
    }
    assert used  # the compression took hold
    ours = logits(model, tmp_path / "compressed.mlpackage")
    theirs = logits(decompressed, tmp_path / "decompressed.mlpackage")
    assert abs(ours - theirs).max() <= TOLERANCE * abs(theirs).max()
    assert abs(ours - logits(plain[target], tmp_path / "plain.mlpackage")).max() > 0
