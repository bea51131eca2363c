"""Placements that people published, with the graphs rebuilt from the sizes they give.

The numbers leave gaps where a report gives no graph to rebuild; letters mark points about single
limits. `reported` is where the operations that count ran: ane, cpu (off the engine), or mixed. A
graph keeps what decides (sizes, operation types, states, shapes), not every detail.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ane_moe.mlprogram.program import Program
from ane_moe.placement.published.graphs import Graph
from ane_moe.placement.published.recorded import measured_graph


@dataclass(frozen=True)
class Point:
    """`counted`: the operation types the report counted; empty where it counted all. `on_cpu`: how
    many of all operations were on the CPU (the others on the engine), where the report says so
    much."""

    number: str
    what: str
    build: Callable[[], Program]
    reported: str
    target: str
    os: int
    source: str
    counted: tuple[str, ...] = ()
    on_cpu: int | None = None


@dataclass(frozen=True)
class Plan:
    """A compute plan that was published, the same on an M4 Pro (macOS 26.5.1) and an M5 Max (26.6),
    CPU and engine allowed: `operations` in all, `on_cpu` of them on the CPU, the others on the
    engine."""

    what: str
    operations: int
    on_cpu: int = 0


# github.com/erwinzhang7/coreml-compute-placement, results/placement-{m4-pro,m5-max}.json: "ops" and
# "by_count_fraction" of CPU_AND_NE. By the names of `measured_graphs.json`.
PLANS = {
    "resnet50": Plan("ResNet-50, batch 16", 122),
    "mobilenet": Plan("MobileNet v2, batch 16", 118),
    "whisper": Plan("Whisper tiny encoder, batch 16", 101),
    "siglip": Plan("SigLIP b16/224 vision tower, batch 16", 282),
    "distilbert": Plan("DistilBERT, 16 x 128 tokens", 148, on_cpu=7),
}


def transformer(
    d: int,
    width: int,
    layers: int,
    heads: int,
    tokens: int,
    weights: str,
    kv_heads: int | None = None,
    slots: int | None = None,
    vocab: int | None = None,
    head: int | None = None,
    embedding: bool = False,
) -> Program:
    """A decoder or encoder of RMS norms, attention and SwiGLU."""
    g = Graph(weights=weights)
    if embedding and vocab:
        ids = g.input("ids", (tokens,), "int32")
        rows = g.op("gather", (tokens, d), x=g.weight((vocab, d)), indices=ids, axis=0)
        x = g.reshape(g.op("transpose", (d, tokens), x=rows, perm=[1, 0]), (1, d, 1, tokens))
    else:
        x = g.input("x", (1, d, 1, tokens))
    for _ in range(layers):
        x = g.same("add", x, g.attention(g.norm(x), heads, head or d // heads, kv_heads, slots))
        x = g.same("add", x, g.swiglu(g.norm(x), width))
    return g.program(g.conv(x, vocab) if vocab else x)


def swiglu(d: int, width: int, weights: str = "fp16") -> Program:
    g = Graph(weights=weights)
    return g.program(g.swiglu(g.input("x", (1, d, 1, 1)), width))


def stateful_attention(
    d: int, heads: int, head: int, kv_heads: int, slots: int, weights: str = "int8"
) -> Program:
    g = Graph(weights=weights)
    return g.program(g.attention(g.norm(g.input("x", (1, d, 1, 1))), heads, head, kv_heads, slots))


def projections(d: int, inner: int) -> Program:
    """Q and O alone."""
    g = Graph(weights="int8")
    return g.program(g.conv(g.conv(g.input("x", (1, d, 1, 1)), inner), d))


def one_matmul(size: int, dtype: str = "fp16") -> Program:
    g = Graph(dtype=dtype, weights=dtype)
    return g.program(g.matmul(g.input("x", (size, size)), g.weight((size, size))))


def fused_attention(heads: int, tokens: int, head: int) -> Program:
    g = Graph()
    query, key, value = (g.input(name, (1, heads, tokens, head)) for name in ("q", "k", "v"))
    return g.program(
        g.op(
            "scaled_dot_product_attention",
            (1, heads, tokens, head),
            query=query,
            key=key,
            value=value,
        )
    )


def one_linear(k: int, out: int, weights: str) -> Program:
    g = Graph(weights=weights)
    return g.program(g.linear(g.input("x", (1, 1, k)), out))


def linear_ffn(d: int, width: int, weights: str = "int8") -> Program:
    """Gate and up over d, product, down over `width`, as linear layers."""
    g = Graph(weights=weights)
    x = g.input("x", (1, 1, d))
    hidden = g.same("mul", g.same("silu", g.linear(x, width)), g.linear(x, width))
    return g.program(g.linear(hidden, d))


def joint(d: int, vocab: int) -> Program:
    g = Graph(weights="fp16")
    a, b = g.linear(g.input("encoder", (1, 1, d)), d), g.linear(g.input("decoder", (1, 1, d)), d)
    return g.program(g.linear(g.same("relu", g.same("add", a, b)), vocab))


def lstm(d: int) -> Program:
    g = Graph(weights="fp16")
    x = g.input("x", (1, 1, d))
    y = g.op("lstm", (1, 1, d), x=x, weight_ih=g.weight((4 * d, d)), weight_hh=g.weight((4 * d, d)))
    return g.program(g.linear(y, d))


def flexible(d: int, layers: int) -> Program:
    """Convolutional blocks over a length from 1 to 512."""
    g = Graph(weights="fp16")
    x = g.input("x", (1, d, 1, None), ranges=((1, 1), (d, d), (1, 1), (1, 512)))
    for _ in range(layers):
        x = g.same("add", x, g.swiglu(g.norm(x), 4 * d))
    return g.program(x)


def packed_experts(d: int, width: int, experts: int, weights: str = "int8") -> Program:
    """Norm, router and all experts as separate convolutions, gated and added up."""
    g = Graph(weights=weights)
    h = g.norm(g.input("x", (1, d, 1, 1)))
    gates = g.op("softmax", (1, experts, 1, 1), x=g.conv(h, experts), axis=1)
    total = h
    for expert in range(experts):
        gate = g.op(
            "slice_by_index",
            (1, 1, 1, 1),
            x=gates,
            begin=[0, expert, 0, 0],
            end=[1, expert + 1, 1, 1],
        )
        total = g.same("add", total, g.same("mul", g.swiglu(h, width), gate))
    return g.program(total)


def wide_conv(channels_in: int, channels_out: int, tokens: int = 64) -> Program:
    g = Graph(weights="int8")
    x = g.input("x", (tokens, channels_in, 1, 1))
    return g.program(g.conv(x, channels_out))


def per_block(d: int, layers: int) -> Program:
    """Convolutions with int4 weights in blocks of 32."""
    import numpy as np

    from ane_moe.mlprogram.program import TensorType
    from ane_moe.placement.published.graphs import literal

    g = Graph(weights="fp16")
    x = g.input("x", (1, d, 1, 1))
    for _ in range(layers):
        for width in (4 * d, d):
            channels = g.size(x, 1)
            data = g._stored(TensorType("int4", (width, channels, 1, 1)))
            scale = g._stored(TensorType("fp16", (width, channels // 32, 1, 1)))
            weight = g._add(
                "constexpr_blockwise_shift_scale",
                {"data": (data,), "scale": (scale,), "offset": (literal(np.int8(0)),)},
                TensorType("fp16", (width, channels, 1, 1)),
                {},
            )
            x = g.op("conv", (1, width, 1, 1), x=x, weight=weight)
    return g.program(x)


def top_1_head(d: int, rows: int) -> Program:
    """A vocabulary slice whose best entry is found in the graph."""
    g = Graph(weights="int8")
    logits = g.conv(g.norm(g.input("x", (1, d, 1, 1))), rows)
    return g.program(g.op("topk", (1, 1, 1, 1), x=logits, k=1, axis=1))


def topk_router(d: int, experts: int) -> Program:
    """A router with topk before packed experts."""
    g = Graph(weights="fp16")
    h = g.norm(g.input("x", (1, d, 1, 1)))
    gates = g.op("softmax", (1, experts, 1, 1), x=g.conv(h, experts), axis=1)
    g.op("topk", (1, 8, 1, 1), x=gates, k=8, axis=1)
    total = h
    for _ in range(16):
        total = g.same("add", total, g.swiglu(h, 704))
    return g.program(total)


def plans() -> Iterator[Point]:
    """The published compute plans, on each chip."""
    for number, (name, plan) in enumerate(PLANS.items(), start=32):
        build, reported = functools.partial(measured_graph, name), "mixed" if plan.on_cpu else "ane"
        for letter, chip in (("a", "m4-pro"), ("b", "m5-max")):
            yield Point(
                f"{number}{letter}",
                plan.what,
                build,
                reported,
                chip,
                26,
                "erwinzhang7/coreml-compute-placement",
                on_cpu=plan.on_cpu,
            )


POINTS = (
    Point(
        "1",
        "MicroGPT, 1 layer of 16 channels, int8",
        lambda: transformer(16, 64, 1, 4, 1, "int8", vocab=27),
        "cpu",
        "m4-max",
        15,
        "ane-book experiment 27",
        ("conv",),
    ),
    Point(
        "2",
        "MicroGPT, 6 layers of 512 channels, 19 MB int8",
        lambda: transformer(512, 2048, 6, 8, 1, "int8", vocab=27),
        "ane",
        "m4-max",
        15,
        "ane-book experiment 27",
        ("conv",),
    ),
    Point(
        "3",
        "stateful block of 64 channels, 4 tokens",
        lambda: transformer(64, 128, 1, 2, 4, "int8", slots=256),
        "cpu",
        "m4-max",
        15,
        "ane-book experiment 26",
    ),
    Point(
        "4",
        "stateful block of 1024 channels, 4 tokens",
        lambda: transformer(1024, 2048, 1, 8, 4, "int8", slots=256),
        "ane",
        "m4-max",
        15,
        "ane-book experiment 26",
    ),
    Point(
        "5",
        "SwiGLU 1024 x 4096, 25 MB fp16",
        lambda: linear_ffn(1024, 4096, "fp16"),
        "cpu",
        "m4-max",
        15,
        "ane-book SCHEMA",
    ),
    Point(
        "6",
        "SwiGLU 2048 x 4096, 50 MB fp16",
        lambda: linear_ffn(2048, 4096, "fp16"),
        "ane",
        "m4-max",
        15,
        "ane-book SCHEMA",
    ),
    Point(
        "7",
        "SwiGLU 2304 x 9216, 127 MB fp16",
        lambda: linear_ffn(2304, 9216, "fp16"),
        "ane",
        "m4-max",
        15,
        "ane-book SCHEMA",
    ),
    Point(
        "8",
        "ZAYA attention, Q and O only, 4 MB int8",
        lambda: projections(2048, 1024),
        "ane",
        "m4-max",
        15,
        "ane-book experiment 29",
        ("conv",),
    ),
    Point(
        "9",
        "ZAYA stateful attention, 2048 slots, 5.3 MB int8",
        lambda: stateful_attention(2048, 8, 128, 2, 2048),
        "ane",
        "m4-max",
        26,
        "ane-book experiments 30, 31",
        ("conv",),
    ),
    Point(
        "11",
        "Privacy Filter expert 640 x 640, 1.2 MB int8",
        lambda: swiglu(640, 640, "int8"),
        "cpu",
        "m4-max",
        15,
        "ane-book (0.22 W on the engine)",
    ),
    Point("12a", "one matmul 512 x 512 x 512", lambda: one_matmul(512), "ane", "m4", 15, "Vx 435"),
    Point("12b", "one matmul 384 x 384 x 384", lambda: one_matmul(384), "cpu", "m4", 15, "Vx 435"),
    Point("13a", "one matmul 4 x 4", lambda: one_matmul(4), "cpu", "m4", 15, "Vx 436"),
    Point(
        "13b",
        "one matmul 4096 x 4096, fp32",
        lambda: one_matmul(4096, "fp32"),
        "cpu",
        "m4",
        15,
        "Vx 436",
    ),
    Point(
        "14a",
        "fused attention 1 x 16 x 1024 x 64",
        lambda: fused_attention(16, 1024, 64),
        "cpu",
        "m4",
        15,
        "Vx 437",
    ),
    Point(
        "14b",
        "fused attention 1 x 16 x 2048 x 64",
        lambda: fused_attention(16, 2048, 64),
        "ane",
        "m4",
        15,
        "Vx 437",
    ),
    Point(
        "14c",
        "fused attention 1 x 32 x 1024 x 128",
        lambda: fused_attention(32, 1024, 128),
        "ane",
        "m4",
        15,
        "Vx 437",
    ),
    Point(
        "15a",
        "decode linear over 4992, fp16",
        lambda: one_linear(4992, 4992, "fp16"),
        "ane",
        "m3-max",
        15,
        "larql 312",
    ),
    Point(
        "15b",
        "decode linear over 4096, int8",
        lambda: one_linear(4096, 4096, "int8"),
        "ane",
        "m3-max",
        15,
        "larql 312",
    ),
    Point(
        "15c",
        "decode linear over 17408",
        lambda: one_linear(17408, 5120, "int8"),
        "cpu",
        "m3-max",
        15,
        "larql 312",
    ),
    Point(
        "16",
        "Qwen FFN 5120 -> 17408 -> 5120, 8 of 12 operations",
        lambda: linear_ffn(5120, 17408),
        "mixed",
        "m3-max",
        15,
        "larql 312",
    ),
    Point(
        "17",
        "encoder, 6 layers of 384, 20 MB fp16",
        lambda: transformer(384, 1024, 6, 6, 64, "fp16"),
        "ane",
        "m4",
        15,
        "ask-meridian.uk",
    ),
    Point(
        "18",
        "encoder, 2 layers, 50 k parameters",
        lambda: transformer(32, 128, 2, 4, 16, "fp16"),
        "cpu",
        "m4",
        15,
        "ask-meridian.uk",
    ),
    Point(
        "19",
        "CTC decoder, 4 operations, 7 MB",
        lambda: joint(640, 4096),
        "ane",
        "m5",
        26,
        "FluidAudio ANE_Profiler",
    ),
    Point(
        "20",
        "LSTM joint, 3 to 29 MB",
        lambda: lstm(640),
        "cpu",
        "m5",
        26,
        "FluidAudio ANE_Profiler",
    ),
    Point(
        "21",
        "CTC decoder (zh), 14 MB",
        lambda: joint(1024, 4800),
        "ane",
        "m5",
        26,
        "FluidAudio ANE_Profiler",
    ),
    Point(
        "22",
        "nemotron joint, 3 linears, 19 MB",
        lambda: joint(640, 13088),
        "ane",
        "m5",
        26,
        "FluidAudio ANE_Profiler; mobius",
    ),
    Point(
        "24",
        "Supertonic estimator, flexible length, 192 MB fp16",
        lambda: flexible(512, 30),
        "cpu",
        "m5",
        26,
        "FluidAudio ANE_Profiler",
    ),
    Point(
        "25",
        "Qwen3-0.6B prefill of 128, 1.2 GB fp16",
        lambda: transformer(1024, 3072, 28, 16, 128, "fp16", kv_heads=8, vocab=65536, head=128),
        "ane",
        "m5-pro",
        26,
        "mobius",
    ),
    Point(
        "26",
        "Qwen3-0.6B decode with states, error -14",
        lambda: transformer(
            1024, 3072, 28, 16, 1, "fp16", kv_heads=8, slots=512, vocab=65536, head=128
        ),
        "cpu",
        "m5-pro",
        26,
        "mobius",
    ),
    Point(
        "27",
        "SmolLM2-135M decode, 0.27 GB fp16, embedding on the CPU",
        lambda: transformer(576, 1536, 30, 9, 1, "fp16", kv_heads=3, vocab=49152, embedding=True),
        "mixed",
        "m4",
        15,
        "onnxsim 1400",
    ),
    Point(
        "28a",
        "Qwen2.5-1.5B decode, 3 GB fp16",
        lambda: transformer(1536, 8960, 28, 12, 1, "fp16", kv_heads=2, vocab=65536, embedding=True),
        "cpu",
        "m4",
        15,
        "onnxsim 1403",
    ),
    Point(
        "28b",
        "Qwen2.5-1.5B decode, 1.5 GB int8, 36 to 43 %",
        lambda: transformer(1536, 8960, 28, 12, 1, "int8", kv_heads=2, vocab=65536, embedding=True),
        "mixed",
        "m4",
        15,
        "onnxsim 1403",
    ),
    Point(
        "31",
        "GLiClass, 66 MB, embedding gather on the CPU",
        lambda: transformer(384, 1536, 12, 6, 64, "fp16", vocab=8192, embedding=True),
        "mixed",
        "m5-pro",
        26,
        "mobius",
    ),
    Point(
        "a",
        "Phi-4-mini, 3 layers, 288 MB int8",
        lambda: transformer(3072, 8192, 3, 24, 1, "int8", kv_heads=8),
        "ane",
        "m4-max",
        15,
        "ane-book j031",
        ("conv",),
    ),
    Point(
        "b",
        "Phi-4-mini, 20 layers, 2.0 GB int8",
        lambda: transformer(3072, 8192, 20, 24, 1, "int8", kv_heads=8),
        "ane",
        "m4-max",
        26,
        "ane-book experiment 26",
        ("conv",),
    ),
    Point(
        "c",
        "Phi-4-mini, 24 layers, 2.4 GB int8",
        lambda: transformer(3072, 8192, 24, 24, 1, "int8", kv_heads=8),
        "cpu",
        "m4-max",
        15,
        "ane-book j055",
    ),
    Point(
        "d",
        "ZAYA experts, 16 x 2048, 201 MB int8",
        lambda: packed_experts(2048, 2048, 16),
        "ane",
        "m4-max",
        26,
        "ane-book experiment 29",
        ("conv",),
    ),
    Point(
        "e",
        "Gemma experts in one shard, 398 MB int8",
        lambda: packed_experts(2816, 704, 67),
        "cpu",
        "m4-max",
        26,
        "ane-book j109",
        ("conv",),
    ),
    Point(
        "f",
        "packed up projection, 640 -> 163,840",
        lambda: wide_conv(640, 163840),
        "ane",
        "m4-max",
        26,
        "ane-book, build_pf_packed_iverson_v2",
        ("conv",),
    ),
    Point(
        "g",
        "packed down projection, 81,920 -> 640",
        lambda: wide_conv(81920, 640),
        "cpu",
        "m4-max",
        26,
        "ane-book, build_pf_packed_iverson_v2",
        ("conv",),
    ),
    Point(
        "h",
        "packed down projection, 20,480 -> 640",
        lambda: wide_conv(20480, 640),
        "ane",
        "m4-max",
        26,
        "ane-book, build_pf_packed_iverson_v2",
        ("conv",),
    ),
    Point(
        "i",
        "int4 weights per block, 3 layers",
        lambda: per_block(1536, 3),
        "cpu",
        "m4-max",
        15,
        "ane-book INT4BUG",
        ("conv",),
    ),
    Point(
        "j",
        "topk over 50,016 rows of a head",
        lambda: top_1_head(3072, 50016),
        "cpu",
        "m4-max",
        15,
        "ane-book j048, j079",
        ("topk",),
    ),
    Point(
        "k",
        "topk over 128 experts of a router",
        lambda: topk_router(2816, 128),
        "ane",
        "m4-max",
        26,
        "ane-book SCHEMA",
        ("topk",),
    ),
    Point(
        "l",
        "topk over 16 experts of a router",
        lambda: topk_router(4096, 16),
        "cpu",
        "m2",
        15,
        "fxlin/Anemll-PhiMoE-exp",
        ("topk",),
    ),
    *plans(),
)
