"""Time the reference runtime against the same maths in plain PyTorch fp32.

    python scripts/bench_runtime.py [--threads 1] [--repeats 30]

Two blocks of a decode step, batch and T of 1: a 16-expert MoE block (d 2048, width 768, per-expert
1x1 convolutions, exact top-4 gates by rounds of maximum and mask), and a GQA attention shard (16
heads over 4 KV heads of 128, a state of 2048 positions written by mask). Prints the median of each
side and their ratio.

    python scripts/bench_runtime.py --shards OUT [--threads 1] [--repeats 30]

A decode step of a MoE shard of the conversion in OUT instead, in turns: every expert and those that
are chosen alone, multiplied as stored and kept expanded, beside PyTorch's fp32 matrices of every
expert. Wall and CPU milliseconds, and the bytes that each holds beside the file. Before that, what
a token costs in the whole loop.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import coremltools as ct
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards, stored_bytes
from ane_moe.manifest import Manifest, Shard, read_manifest
from ane_moe.runtime import load_package, open_package
from ane_moe.runtime.memory import Memory
from ane_moe.runtime.reference.stored_rows import widened

D, WIDTH, EXPERTS, K = 2048, 768, 16, 4
HEADS, KV_HEADS, HEAD_DIM, S = 16, 4, 128, 2048


class Moe(nn.Module):
    """Router, exact top-k gates, and all experts, each of three 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Conv2d(D, EXPERTS, 1, bias=False)
        self.gate = nn.ModuleList(nn.Conv2d(D, WIDTH, 1, bias=False) for _ in range(EXPERTS))
        self.up = nn.ModuleList(nn.Conv2d(D, WIDTH, 1, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, D, 1, bias=False) for _ in range(EXPERTS))

    def gates(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.router(x), 1)
        left, chosen = scores, torch.zeros_like(scores)
        for _ in range(K):
            top = (left == left.amax(1, keepdim=True)).to(scores.dtype)
            chosen = chosen + top
            left = left - 2 * top
        gates = scores * chosen
        return gates / gates.sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        y = x
        for e, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            y = y + gates[:, e : e + 1] * down(F.silu(gate(x)) * up(x))
        return y


class Attention(nn.Module):
    """One decode step: RMS norm, projections, cache write by mask, attention over the whole cache,
    residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(1, D, 1, 1))
        self.q = nn.Conv2d(D, HEADS * HEAD_DIM, 1, bias=False)
        self.k = nn.Conv2d(D, KV_HEADS * HEAD_DIM, 1, bias=False)
        self.v = nn.Conv2d(D, KV_HEADS * HEAD_DIM, 1, bias=False)
        self.o = nn.Conv2d(HEADS * HEAD_DIM, D, 1, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, KV_HEADS, HEAD_DIM, S))

    def forward(self, x: Tensor, mask: Tensor, write: Tensor, keep: Tensor) -> Tensor:
        h = x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6) * self.norm
        q = self.q(h).reshape(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        k = self.k(h).reshape(1, KV_HEADS, HEAD_DIM, 1)
        v = self.v(h).reshape(1, KV_HEADS, HEAD_DIM, 1)
        self.k_cache[:] = self.k_cache * keep + k * write
        self.v_cache[:] = self.v_cache * keep + v * write
        scores = torch.softmax(q @ self.k_cache * HEAD_DIM**-0.5 + mask, -1)
        y = scores @ self.v_cache.transpose(-1, -2)
        return x + self.o(y.reshape(1, HEADS * HEAD_DIM, 1, 1))


def convert(module: nn.Module, example: dict[str, Tensor], folder: Path) -> Path:
    """A package of `module` at iOS 18 in fp16; its buffers become states."""
    traced = torch.jit.trace(module, tuple(example.values()), check_trace=False)
    states = [
        ct.StateType(ct.TensorType(shape=tuple(b.shape), dtype=np.float16), name=n)
        for n, b in module.named_buffers()
    ]
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(n, tuple(t.shape), dtype=np.float16) for n, t in example.items()],
        outputs=[ct.TensorType("y", dtype=np.float16)],
        states=states or None,
        skip_model_load=True,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
    )
    path = folder / f"{type(module).__name__}.mlpackage"
    model.save(str(path))
    return path


def alternate(
    sides: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each side, run in turns so that both see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 3):
        for name, call in sides.items():
            start = clock()
            call()
            if turn >= 3:  # warm-up
                times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_experts(out: Path, shard: Shard, repeats: int) -> None:
    """A decode step of one shard with experts."""
    stored, expanded = (
        open_package(out / shard.path, "reference", memory=Memory(limit)).function("decode")
        for limit in (0, 1 << 40)
    )
    rng = np.random.default_rng(0)
    inputs = {
        feature.name: rng.standard_normal(feature.type.shape).astype(np.float16)
        for feature in stored.inputs
    }
    calls = {
        f"{name}, {which}": partial(call, *given)
        for name, function in (("as stored", stored), ("expanded", expanded))
        for which, call, given in (
            ("every expert", function.observe, (inputs, lambda *_: None)),
            ("those chosen", function.predict, (inputs,)),
        )
    }
    for function in (stored, expanded):
        function.predict(inputs)
    matrices = [
        torch.cat([widened(block).clone() for block in matrix._blocks()])
        for matrix in expanded._matrices()
    ]
    columns = {matrix.shape[1]: torch.randn(matrix.shape[1], 1) for matrix in matrices}
    calls["PyTorch fp32, every expert"] = lambda: [m @ columns[m.shape[1]] for m in matrices]
    bytes_ = sum(path.stat().st_size for path in (out / shard.path).rglob("*") if path.is_file())
    dense = sum(matrix.nbytes for matrix in matrices)
    held = {"as": stored.held_bytes, "expanded": expanded.held_bytes, "PyTorch": dense}
    print(f"{shard.path}: {bytes_ / 1e6:,.0f} MB on disk")
    walls = alternate(calls, repeats)
    cpus = alternate(calls, repeats, time.process_time)
    for name in calls:
        beside = next(size for key, size in held.items() if name.startswith(key))
        print(
            f"{name:28} {walls[name]:8.1f} ms   {cpus[name]:8.1f} ms of CPU   "
            f"{beside / 1e6:8,.1f} MB beside the file"
        )


def measure_loop(out: Path, manifest: Manifest, repeats: int) -> None:
    """A token of the whole conversion, by the memory that weights may take."""
    whole = stored_bytes(out, manifest) / 1e6
    for limit in (0.0, whole * 1.2):
        session = Session(load_shards(out, "reference", memory_mb=limit))
        session.prefill(list(range(8)))
        step = alternate({"token": partial(session.decode, 5)}, min(repeats, session.room - 4))
        peak = psutil.Process().memory_info().rss / 1e6
        print(
            f"a token of {whole:,.0f} MB of packages, --memory-mb {limit:.0f}: "
            f"{step['token']:.1f} ms, {peak:,.0f} MB resident"
        )


def measure(
    module: nn.Module, example: dict[str, Tensor], folder: Path, repeats: int
) -> dict[str, float | str]:
    path = convert(module, example, folder)
    inputs = {name: tensor.half().numpy() for name, tensor in example.items()}
    start = time.perf_counter()
    fn = load_package(path, runtime="reference")
    load = time.perf_counter() - start
    state = fn.make_state()
    ours = fn.predict(inputs, state)["y"]
    for buffer in module.buffers():
        buffer.zero_()
    theirs = module(*example.values()).numpy()
    error = np.linalg.norm(ours.astype(np.float32) - theirs) / np.linalg.norm(theirs)
    medians = alternate(
        {
            "reference": lambda: fn.predict(inputs, state),
            "pytorch": lambda: module(*example.values()),
        },
        repeats,
    )
    return {
        "block": type(module).__name__,
        "load_ms": round(load * 1e3, 1),
        "relative_error": float(f"{error:.1e}"),
        "reference_ms": round(medians["reference"], 2),
        "pytorch_ms": round(medians["pytorch"], 2),
        "ratio": round(medians["reference"] / medians["pytorch"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--shards", type=Path, help="time a conversion")
    options = parser.parse_args()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.shards:
        manifest = read_manifest(options.shards)
        measure_loop(options.shards, manifest, options.repeats)
        shard = next(shard for shard in manifest.shards if shard.kind == "moe")
        return measure_experts(options.shards, shard, options.repeats)
    x = torch.randn(1, D, 1, 1)
    write = torch.zeros(1, 1, 1, S)
    write[..., 5] = 1
    mask = torch.where(torch.arange(S) <= 5, 0.0, -1e4).reshape(1, 1, 1, S)
    attention = {"x": x, "mask": mask, "write": write, "keep": 1 - write}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for module, example in ((Moe(), {"x": x}), (Attention(), attention)):
            print(json.dumps(measure(module.eval(), example, Path(folder), options.repeats)))


if __name__ == "__main__":
    main()
