"""What the engine's arithmetic costs: each operation beside the same one with exact sums.

    python scripts/bench_engine.py [--repeats 20]

One thread, both alternating in one process; the median of CPU seconds (user and system) a call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.engine.arithmetic import Engine
from ane_moe.runtime.reference.engine.ledger import Ledger
from ane_moe.runtime.reference.engine.ops import ENGINE_TABLE
from ane_moe.runtime.reference.ops import TABLE
from ane_moe.runtime.reference.ops.arithmetic import Exact
from ane_moe.runtime.reference.ops.table import OpTable

OPSET = 18


@dataclass(frozen=True)
class Case:
    """An operation on tensors of these shapes, `scale` being the size of the first one."""

    label: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    scale: float = 1.0


CASES = (
    Case("expert gate, 1 token", "conv", ((1, 2048, 1, 1), (768, 2048, 1, 1))),
    Case("expert down, 1 token", "conv", ((1, 768, 1, 1), (2048, 768, 1, 1)), 0.1),
    Case("expert gate, 64 tokens", "conv", ((1, 2048, 1, 64), (768, 2048, 1, 1))),
    Case("expert down, 64 tokens", "conv", ((1, 768, 1, 64), (2048, 768, 1, 1)), 0.1),
    Case("scores, 32 heads, 2048 positions", "matmul", ((1, 32, 1, 128), (1, 32, 128, 2048))),
    Case("kernel of 4, 64 channels", "conv", ((1, 64, 1, 256), (64, 64, 1, 4))),
    Case("add", "add", ((1, 2048, 1, 64), (1, 2048, 1, 64))),
    Case("mul", "mul", ((1, 2048, 1, 64), (1, 2048, 1, 64))),
    Case("real_div", "real_div", ((1, 2048, 1, 64), (1, 2048, 1, 64))),
    Case("sigmoid", "sigmoid", ((1, 768, 1, 64),)),
    Case("silu", "silu", ((1, 768, 1, 64),)),
    Case("gelu", "gelu", ((1, 768, 1, 64),)),
    Case("exp", "exp", ((1, 768, 1, 64),)),
    Case("softmax", "softmax", ((1, 32, 1, 2048),)),
    Case("layer_norm", "layer_norm", ((1, 64, 2048),)),
)


def tensors(case: Case) -> list[Tensor]:
    """fp16 numbers: the first of the case's scale, the others as weights are."""
    torch.manual_seed(0)
    first, *others = case.shapes
    sizes = [case.scale, *(0.02 if case.op == "conv" else 1.0 for _ in others)]
    return [
        (torch.randn(shape) * size).half()
        for shape, size in zip((first, *others), sizes, strict=True)
    ]


def call(case: Case, table: OpTable, arith: Exact | Engine) -> Callable[[], object]:
    op = table.find(case.op, OPSET)
    assert op is not None
    given = tensors(case)
    offered = {"arith": arith, "out": (TensorType("fp16", case.shapes[0]),), "axes": [-1]}
    kernel = op.make(**{name: offered[name] for name in offered if name in op.parameters})
    if op.half == "widen":
        given = [one.float() for one in given]
    optional = [None] * (op.tensors.count("?"))
    return lambda: kernel(*given, *optional)


def cpu_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("| operation | exact ms | engine ms | times | with notes, times |\n|---|---|---|---|---|")
    for case in CASES:
        runs = [
            call(case, TABLE, Exact()),
            call(case, ENGINE_TABLE, Engine()),
            call(case, ENGINE_TABLE, Engine(Ledger())),
        ]
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(repeats + 1):
            for run, seconds in zip(runs, found, strict=True):
                seconds.append(cpu_seconds(run))
        exact, engine, noted = (1000 * statistics.median(seconds[1:]) for seconds in found)
        print(
            f"| {case.label} | {exact:.3f} | {engine:.3f} | {engine / exact:.1f} "
            f"| {noted / exact:.1f} |"
        )


if __name__ == "__main__":
    main()
