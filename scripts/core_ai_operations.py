"""What single operations of Core AI's CPU runtime lose, in fp16, beside one rounding of an exact
result: the table of docs/coreai.md.

    python scripts/core_ai_operations.py
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.runtime import load_package  # noqa: E402
from ane_moe.runtime.coreai.installed import core_ai, quiet  # noqa: E402


class Called(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.function(*inputs),)


def computed(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> np.ndarray:
    """The function by Core AI, fp64 of its fp16."""
    tools, names = core_ai("coreai_torch"), [f"x{place}" for place in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.aimodel"
        with quiet():
            exported = torch.export.export(Called(function), inputs)
            exported = exported.run_decompositions(tools.get_decomp_table())
            converter = tools.TorchConverter().add_exported_program(
                exported, input_names=names, output_names=["y"]
            )
            converter.to_coreai().save_asset(path)
        given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return load_package(path, runtime="coreai").predict(given)["y"].astype(np.float64)


def row(name: str, function: Callable[..., Tensor], *inputs: Tensor) -> str:
    exact = function(*(each.double() for each in inputs)).numpy()
    found, rounded = computed(function, inputs), exact.astype(np.float16).astype(np.float64)
    size = np.linalg.norm(exact)
    errors = [f"{np.linalg.norm(each - exact) / size:.1e}" for each in (found, rounded)]
    return f"| {name} | {errors[0]} | {errors[1]} | {np.abs(found - exact).max():.1e} |"


def main() -> None:
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    line = torch.linspace(-12, 12, 4096).half().reshape(1, 64, 1, 64)
    print("| operation | Core AI, relative L2 | rounded once | Core AI, largest |")
    print("|---|---|---|---|")
    for count in (64, 1024, 4096):
        weight = drawn(64, count, 1, 1) * 0.05
        print(row(f"1x1 convolution of {count}", functional.conv2d, drawn(1, count, 1, 1), weight))
        pair = (drawn(1, 2, 16, count), drawn(1, 2, count, 64) * 0.05)
        print(row(f"matmul over {count}", torch.matmul, *pair))
        print(row(f"sum of {count}", lambda x: x.sum(1, True), drawn(1, count, 1, 4)))
    print(row("mean of 4096", lambda x: x.mean(1, True), drawn(1, 4096, 1, 4) + 3))
    scores = drawn(1, 4, 16, 512) * 4
    print(row("softmax of 512", lambda x: x.softmax(-1), scores))
    print(row("softmax, scores to 800", lambda x: x.softmax(-1), drawn(1, 4, 16, 64) * 200))
    print(row("sigmoid", torch.sigmoid, line))
    print(row("silu", functional.silu, line))
    print(row("silu near zero", functional.silu, line / 100))
    print(row("tanh", torch.tanh, line))
    print(row("softplus", functional.softplus, line))
    print(row("gelu", functional.gelu, line))
    print(row("exp", torch.exp, line.clamp(-12, 11)))
    print(row("rsqrt", torch.rsqrt, line.abs() + 0.01))


if __name__ == "__main__":
    main()
