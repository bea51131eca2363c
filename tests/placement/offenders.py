"""Real packages with one thing in them that the engine does not take, made by coremltools."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ane_moe.coreml_tools import ct
from ane_moe.mlprogram.program import Program
from ane_moe.placement.published.graphs import Graph

mb, types = ct.converters.mil.mil.Builder, ct.converters.mil.mil.types
STREAM = (1, 64, 1, 64)


def save(
    path: Path,
    body: Callable,
    shape: tuple[int, ...] = STREAM,
    target=ct.target.iOS18,
    **inputs: tuple,
) -> Path:
    """`body(x, **inputs)` as a package; each further input is (shape, type)."""
    specs = {"x": mb.TensorSpec(shape, dtype=types.fp16)}
    specs |= {name: mb.TensorSpec(size, dtype=kind) for name, (size, kind) in inputs.items()}
    return convert(path, body, specs, target)


def convert(path: Path, body: Callable, specs: dict, target=ct.target.iOS18) -> Path:
    arguments = ", ".join(specs)
    build = eval(
        f"lambda {arguments}: body({', '.join(f'{name}={name}' for name in specs)})", {"body": body}
    )
    program = mb.program(input_specs=list(specs.values()), opset_version=target)(build)
    model = ct.convert(
        program,
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def half(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def with_topk(path: Path) -> Path:
    return save(path, lambda x: mb.topk(x=x, k=3, axis=1)[0], (1, 50016, 1, 1))


def with_gather(path: Path) -> Path:
    return save(path, lambda x, i: mb.gather(x=x, indices=i, axis=1), i=((3,), types.int32))


def with_int32_add(path: Path) -> Path:
    return save(path, lambda x, i: (mb.relu(x=x), mb.add(x=i, y=i)), i=((1, 64), types.int32))


def with_rank_6_reshape(path: Path) -> Program:
    """In memory: coremltools writes no tensor of rank 6."""
    g = Graph()
    return g.program(g.reshape(g.reshape(g.input("x", STREAM), (1, 2, 2, 16, 1, 64)), STREAM))


def with_wide_contraction(path: Path) -> Path:
    return save(path, lambda x: mb.conv(x=x, weight=half(4, 70000, 1, 1)), (1, 70000, 1, 1))


def with_wide_linear(path: Path) -> Path:
    return save(path, lambda x: mb.linear(x=x, weight=half(4, 70000)), (1, 1, 70000))


def with_per_block_weight(path: Path) -> Path:
    def body(x):
        data = np.zeros((64, 64, 1, 1), types.np_int4_dtype)
        weight = mb.constexpr_blockwise_shift_scale(
            data=data, scale=half(64, 2, 1, 1) + np.float16(1)
        )
        return mb.conv(x=x, weight=weight)

    return save(path, body)


def with_vector_palette(path: Path) -> Path:
    """Each index stands for two weights of a column."""

    def body(x):
        indices = np.zeros((32, 64, 1, 1), types.np_uint4_dtype)
        lut = half(1, 1, 1, 1, 16, 2)
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=0)
        return mb.conv(x=x, weight=weight)

    return save(path, body)


def with_dynamic_slice(path: Path) -> Path:
    return save(
        path,
        lambda x, at: mb.slice_by_size(x=x, begin=at, size=[1, 4, 1, 64]),
        at=((4,), types.int32),
    )


def with_fused_attention(path: Path) -> Path:
    shape = (1, 16, 2048, 64)
    return save(
        path,
        lambda x, k, v: mb.scaled_dot_product_attention(query=x, key=k, value=v),
        shape,
        k=(shape, types.fp16),
        v=(shape, types.fp16),
    )


def with_tokens_before_a_last_axis_of_1(path: Path) -> Path:
    return save(path, lambda x: mb.relu(x=x), (1, 64, 64, 1))


def with_state(path: Path, width: int) -> Path:
    specs = {
        "x": mb.TensorSpec((1, 4, 1, width), dtype=types.fp16),
        "cache": mb.StateTensorSpec((1, 4, 1, width), dtype=types.fp16),
    }

    def body(x, cache):
        return mb.coreml_update_state(state=cache, value=mb.add(x=mb.read_state(input=cache), y=x))

    return convert(path, body, specs)


def with_state_270(path: Path) -> Path:
    return with_state(path, 270)


def with_large_weights(path: Path, size: int = 3 << 30) -> Path:
    """A sound package whose weight file goes on to `size` bytes, none of them on the disk."""
    save(path, lambda x: mb.conv(x=x, weight=half(64, 64, 1, 1)))
    os.truncate(path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin", size)
    return path


# The rule that has to find it, and the operation it has to name (None: the whole function; an input
# or state by name).
OFFENDERS: dict[Callable[[Path], Path | Program], tuple[str, str | None]] = {
    with_topk: ("topk-wide", "topk"),
    with_gather: ("gather", "gather"),
    with_int32_add: ("int32", "add"),
    with_rank_6_reshape: ("rank-over-5", "reshape"),
    with_wide_contraction: ("conv-input-channels", "conv"),
    with_wide_linear: ("contraction-limit", "linear"),
    with_per_block_weight: ("per-block-weight", "conv"),
    with_dynamic_slice: ("dynamic-slice", "slice_by_size"),
    with_fused_attention: ("attention-fused-os-26", "scaled_dot_product_attention"),
    with_tokens_before_a_last_axis_of_1: ("singleton-last-axis", "input"),
    with_state_270: ("state-width", "state"),
    with_large_weights: ("weight-file-over-2-gib", None),
}
CONTESTED = (with_tokens_before_a_last_axis_of_1,)
