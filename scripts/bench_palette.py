"""Our palettes beside coremltools' on the same weights: time, and the squared error that is left.

    scripts/bench_palette.py [--rows 768] [--columns 2048] [--rounds 3]

Both make 4-bit k-means palettes, once of groups of 16 output channels and once of the whole matrix,
of the weight of one 1x1 convolution drawn from a normal distribution. coremltools' own time is that
of `palettize_weights` on a model of this one convolution; ours that of encoding the weight.
"""

import argparse
import os
import statistics
import time

import numpy as np

from ane_moe.coreml_tools import ct
from ane_moe.formats.encoders import parse_format
from ane_moe.formats.expand import expand

FORMATS = {
    "groups of 16 channels": ("lut4", {"granularity": "per_grouped_channel", "group_size": 16}),
    "whole matrix": ("lut4-tensor", {"granularity": "per_tensor"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    weight = (
        np.random.default_rng(0).standard_normal((arguments.rows, arguments.columns)) * 0.02
    ).astype(np.float16)
    print(
        f"{arguments.rows} x {arguments.columns} weights, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    for what, (name, settings) in FORMATS.items():
        theirs_seconds, theirs = theirs_palette(weight, settings)
        form = parse_format(name)
        form.encode(weight[:64])
        seconds = []
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            encoded = form.encode(weight)
            seconds.append(time.perf_counter() - started)
        ours = statistics.median(seconds)
        errors = [
            float(((value.astype(np.float64) - weight) ** 2).sum())
            for value in (expand(encoded), theirs)
        ]
        print(
            f"{what}: ours {weight.size / ours / 1e6:.1f} M weights/s, coremltools "
            f"{weight.size / theirs_seconds / 1e6:.2f} M/s, ratio {theirs_seconds / ours:.0f}; "
            f"squared error ours / theirs {errors[0] / errors[1]:.4f}"
        )


def theirs_palette(weight: np.ndarray, settings: dict) -> tuple[float, np.ndarray]:
    """Seconds of coremltools' compression, and the weight it stands for."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.optimize.coreml import (
        OpPalettizerConfig,
        OptimizationConfig,
        decompress_weights,
        palettize_weights,
    )

    @mb.program(
        input_specs=[
            mb.TensorSpec((1, weight.shape[1], 1, 1), dtype=ct.converters.mil.mil.types.fp16)
        ],
        opset_version=ct.target.iOS18,
    )
    def program(x):
        return mb.conv(x=x, weight=weight.reshape(*weight.shape, 1, 1), name="y")

    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT16,
    )
    config = OptimizationConfig(
        OpPalettizerConfig(mode="kmeans", nbits=4, weight_threshold=0, **settings)
    )
    started = time.perf_counter()
    compressed = palettize_weights(model, config)
    seconds = time.perf_counter() - started
    restored = decompress_weights(compressed)
    functions = restored._mil_program.functions["main"]
    conv = next(op for op in functions.operations if op.op_type == "conv")
    return seconds, np.asarray(conv.weight.val).reshape(weight.shape)


if __name__ == "__main__":
    main()
