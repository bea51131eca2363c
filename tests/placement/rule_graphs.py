"""For each rule that neither a published placement nor a planted offender shows: the smallest graph
that it speaks of, and the chip and system."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ane_moe.coreml_tools import ct
from ane_moe.mlprogram.program import Block, Program
from ane_moe.placement.published.dispatched import dispatched_graphs
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.published.points import swiglu
from tests.placement.offenders import half, mb, save, types

STREAM = (1, 64, 1, 64)
Case = tuple[Callable[..., Program], str, int]


def one(kind: str, shape=STREAM, given: str = "fp16", to=None, **inputs: object) -> Program:
    """An operation on an input of `shape`."""
    g = Graph(weights="fp16")
    x = g.input("x", shape, given)
    return g.program(g.op(kind, to or shape, x=x, **inputs))


def published(name: str) -> Program:
    return next(graph for graph in dispatched_graphs() if graph.name == name).program()


def chain(kind: str, count: int) -> Program:
    g = Graph(weights="fp16")
    x = g.input("x", STREAM)
    for _ in range(count):
        x = g.conv(x, 64) if kind == "conv" else g.same(kind, x)
    return g.program(x)


def stateful(states: int, dtype: str = "fp16", update: bool = False) -> Program:
    g = Graph(weights="fp16")
    x = g.input("x", STREAM)
    for number in range(states):
        g.state(f"cache_{number}", STREAM)
        if dtype != "fp16":
            feature = g.features["state"][number]
            kind = replace(feature.type, dtype=dtype)
            g.features["state"][number] = replace(feature, type=kind)
        x = g.same("add", x, g.op("read_state", STREAM, input=f"cache_{number}"))
    if update:
        x = g.op("slice_update", STREAM, x=x, update=x, begin=[0, 0, 0, 0])
        g.op("write_state", STREAM, input="cache_0", data=x)
    return g.program(x)


def flexible(states: int = 0, **options: object) -> Program:
    g = Graph(weights="fp16")
    x = g.input("x", (1, 64, 64), **options)
    for number in range(states):
        g.state(f"cache_{number}", (1, 64, 64))
    return g.program(g.op("layer_norm", (1, 64, 64), x=x, axes=[1]))


def grouped(channels: int, out: int, groups: int) -> Program:
    g = Graph(weights="fp16")
    weight = g.weight((out, channels // groups, 1, 1))
    x = g.input("x", (1, channels, 1, 8))
    return g.program(g.op("conv", (1, out, 1, 8), x=x, weight=weight, groups=groups))


def patches(side: int) -> Program:
    g = Graph(weights="fp16")
    weight, x = g.weight((64, 3, side, side)), g.input("x", (1, 3, 4 * side, 4 * side))
    return g.program(g.op("conv", (1, 64, 4, 4), x=x, weight=weight, strides=[side, side]))


def linear(shape, out: int = 64) -> Program:
    g = Graph(weights="fp16")
    return g.program(g.linear(g.input("x", shape), out))


def product(shape) -> Program:
    g = Graph(weights="fp16")
    x = g.input("x", shape)
    return g.program(g.matmul(x, x, transpose_y=True))


def joined(count: int) -> Program:
    g = Graph(weights="fp16")
    values = tuple(g.input(f"x{number}", STREAM) for number in range(count))
    return g.program(g.op("concat", (1, 64 * count, 1, 64), values=values, axis=1))


def branches() -> Program:
    g, inner = Graph(weights="fp16"), Graph(weights="fp16")
    x, go = g.input("x", STREAM), g.input("go", (1,), "bool")
    y = inner.same("relu", inner.input(x, STREAM))
    block = Block((), tuple(inner.operations), (y,))
    return g.program(g.op("cond", STREAM, pred=go, blocks=(block, block)))


def many_functions(count: int) -> Program:
    program = one("relu")
    functions = {f"f{number}": program.functions["main"] for number in range(count)}
    interfaces = {name: program.interfaces["main"] for name in functions}
    return replace(program, functions=functions, interfaces=interfaces, default_function="f0")


def palette(path, *, entries=16, groups=1, joint=False, per_channel=False) -> Program:
    """A convolution by a weight of 4 bits, as coremltools writes it."""

    def body(x):
        if per_channel:
            data = np.zeros((64, 64, 1, 1), types.np_int4_dtype)
            weight = mb.constexpr_blockwise_shift_scale(data=data, scale=half(64, 1, 1, 1) + 1)
        else:
            lut = half(groups, 1, 1, 1, entries, 1)
            if joint:
                scale = half(1, 1, 1, 1, 1, 1) + 1
                data = np.zeros(lut.shape, np.int8)
                lut = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
            indices = np.zeros((64, 64, 1, 1), types.np_uint4_dtype)
            weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut)
        return mb.conv(x=x, weight=weight)

    return save(path, body, target=ct.target.iOS18)


def large(weights: str = "fp16") -> Program:
    g = Graph(weights=weights)
    return g.program(g.same("relu", g.conv(g.input("x", (1, 4096, 1, 1)), 4096)))


def five_large() -> Program:
    g = Graph(weights="int8")
    x = g.input("x", (1, 8192, 1, 1))
    for _ in range(5):
        x = g.swiglu(x, 8192)
    return g.program(x)


RULES: dict[str, Case] = {
    "cost-small": (lambda: swiglu(64, 64), "m4", 27),
    "cost-not-covered": (lambda: swiglu(2304, 9216), "iphone-a17", 26),
    "cost-equal": (large, "m4", 27),
    "cost-undecided": (lambda: linear((1, 1, 4096), 8192), "m5", 27),
    "cost-large": (large, "m4", 27),
    "iphone-over-1-gb": (five_large, "iphone-a17", 26),
    "many-functions": (lambda: many_functions(129), "m4", 26),
    "many-states-iphone": (lambda: stateful(3), "iphone-a17", 26),
    "enumerated-shapes-with-state": (
        lambda: flexible(1, shapes=((1, 64, 64), (1, 64, 32))),
        "m4",
        26,
    ),
    "enumerated-shapes": (lambda: flexible(shapes=((1, 64, 64), (1, 64, 32))), "m4", 26),
    "layer-norm-enumerated": (lambda: flexible(shapes=((1, 64, 64), (1, 64, 32))), "m4", 26),
    "shape-range-small": (lambda: flexible(ranges=((1, 1), (64, 64), (1, 4))), "m4", 26),
    "many-layers-iphone": (lambda: chain("sigmoid", 1601), "iphone-a17", 26),
    "many-convolutions-m6": (lambda: chain("conv", 387), "m6", 27),
    "long-chain-m6": (lambda: chain("sigmoid", 101), "m6", 27),
    "state-dtype": (lambda: stateful(1, "fp32"), "m4", 26),
    "feature-rank": (lambda: one("relu", (1, 1, 1, 4, 4, 4)), "m4", 26),
    "wide-types": (lambda: one("relu", given="int64"), "m4", 26),
    "channel-limit-conv-27": (lambda: grouped(64, 65537, 1), "m4", 27),
    "infinite-constant": (lambda: one("add", y=np.float16("inf")), "m4", 26),
    "inside-control-flow": (branches, "m4", 26),
    "control-flow": (branches, "m4", 26),
    "activation-quantization-old": (lambda: published("quantize_i8"), "m2", 26),
    "conv-patches-wide": (lambda: patches(32), "m4", 26),
    "conv-dynamic-weight": (lambda: published("conv_dynw"), "m4", 26),
    "conv-depthwise-iphone": (lambda: grouped(64, 64, 64), "iphone-a17", 26),
    "conv-groups": (lambda: grouped(8192, 64, 2), "m4", 26),
    "conv-group-packing": (lambda: grouped(64, 65536, 2), "m4", 26),
    "conv-transpose": (lambda: published("conv_transpose"), "m4", 26),
    "linear-rank-2": (lambda: linear((8, 64)), "m4", 26),
    "linear-rank-5": (lambda: linear((1, 1, 1, 8, 64)), "m4", 26),
    "matmul-rank-5": (lambda: product((1, 1, 2, 8, 64)), "m4", 26),
    "einsum": (lambda: one("einsum", equation="abcd->abcd"), "m4", 26),
    "layer-norm-rank": (lambda: one("layer_norm", (8, 64), axes=[1]), "m4", 26),
    "trigonometry-old": (lambda: published("sin"), "m2", 26),
    "trigonometry": (lambda: published("sin"), "m3", 26),
    "atan-elsewhere": (lambda: published("atan"), "m4", 26),
    "log-sum-exp": (lambda: published("reduce_log_sum_exp_c"), "m4", 26),
    "topk-m1": (lambda: published("topk_c"), "m1", 26),
    "gather-constant": (lambda: published("gather_c"), "m4", 26),
    "fill-like-elsewhere": (lambda: published("fill_like"), "m4", 26),
    "logic": (lambda: published("logical_and"), "m4", 26),
    "cast-fp32-output": (lambda: published("cast_f16_f32"), "m4", 26),
    "cast-fp32": (lambda: published("cast_f16_f32"), "m4", 15),
    "cast": (lambda: one("cast", given="int8", dtype="fp16"), "m4", 26),
    "wide-concat": (lambda: joined(12), "m4", 26),
    "slice-last-axis-saturates": (
        lambda: one("slice_by_index", to=(1, 64, 1, 32), begin=[0, 0, 0, 32], end=[1, 64, 1, 64]),
        "m2",
        26,
    ),
    "slice-update": (lambda: one("slice_update", begin=[0, 0, 0, 0]), "m4", 26),
    "slice-update-state": (lambda: stateful(1, update=True), "m4", 26),
    "pad-channels": (lambda: published("pad_c"), "m4", 26),
    "pad-mode-m1": (lambda: published("pad_reflect"), "m1", 26),
    "pad-mode": (lambda: published("pad_reflect"), "m4", 26),
    "pad-rank": (lambda: one("pad", (64,), pad=[1, 1], mode="constant"), "m4", 26),
    "tile": (lambda: published("tile"), "m4", 26),
    "tile-dynamic": (lambda: one("tile"), "m4", 26),
    "reverse": (lambda: published("reverse_w"), "m4", 26),
    "resampling-m1": (lambda: published("resize_bilinear"), "m1", 26),
    "resampling": (lambda: published("resize_bilinear"), "m4", 26),
}
# What coremltools has to write, into the folder given.
STORED: dict[str, Case] = {
    "int4-per-channel": (lambda path: palette(path, per_channel=True), "m4", 26),
    "palette-os-26": (palette, "m4", 26),
    "palette-groups": (palette, "m4", 15),
    "joint-palette": (lambda path: palette(path, joint=True), "m4", 15),
}
# Beside each of its own chips: where a rule that names chips or systems does not hold.
ELSEWHERE = {
    "many-convolutions-m6": ("m4", 27),
    "long-chain-m6": ("m4", 27),
    "many-states-iphone": ("m4", 26),
    "topk-m1": ("m2", 26),
    "pad-mode": ("m4", 27),
    "palette-os-26": ("m4", 15),
}
