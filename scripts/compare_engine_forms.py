"""What a graph's form is worth on the Neural Engine: the same maths written in two ways, both
computed by the engine's published arithmetic, against fp64. Prints a table. Predicted.

    python scripts/compare_engine_forms.py
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ane_moe.coreml_tools import ct
from ane_moe.parts.norm import RmsNorm
from ane_moe.runtime import load_package
from ane_moe.runtime.reference.engine.rounding import to_fp16
from ane_moe.runtime.reference.engine.tables import look_up

WIDTH, TERMS = 512, 2880
EPS = 1e-6


@dataclass(frozen=True)
class Form:
    """A module, or a MIL program, of one input `x`, and the factor that it leaves in its result."""

    label: str
    made: nn.Module | Callable[..., object]
    factor: float = 1.0


@dataclass(frozen=True)
class Comparison:
    what: str
    x: np.ndarray
    exact: Callable[[np.ndarray], np.ndarray]
    forms: tuple[Form, ...]


def elementwise(compute: Callable[[Tensor], Tensor]) -> nn.Module:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return compute(x)

    return Module()


class PlainNorm(nn.Module):
    """Squares of the numbers themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS)


def our_norm() -> nn.Module:
    norm = RmsNorm(WIDTH, EPS)
    norm.weight.data.fill_(1.0)
    return norm


def product(weight: np.ndarray, scale: float) -> nn.Module:
    """`weight @ x`, with a power of two in the weights: exact but for subnormals."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    layer.weight.data = torch.from_numpy(weight[:, :, None, None] * scale).float()
    return layer


def comparisons() -> list[Comparison]:
    draw = np.random.default_rng(0)
    line = np.linspace(-15, 15, WIDTH).astype(np.float16).reshape(1, WIDTH, 1, 1)
    hidden = draw.standard_normal((1, WIDTH, 1, 1))
    weight = np.abs(draw.standard_normal((8, TERMS)) * 0.05).astype(np.float16)
    rising = draw.uniform(0, 600, (1, TERMS, 1, 1)).astype(np.float16)
    signs = np.where(np.arange(TERMS) < TERMS // 2, 1, -1)
    halves = (weight * signs).astype(np.float16)
    woven = np.argsort(np.arange(TERMS) % (TERMS // 2), kind="stable")
    cancelled = np.full((1, TERMS, 1, 1), 700, np.float16)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(1, keepdims=True) + EPS)

    norms = (Form("squares of x", PlainNorm()), Form("x over its largest first", our_norm()))
    written = elementwise(lambda x: torch.sigmoid(x) * (x + 0.0 * x[:, :1]) * 1.0)
    tanh = elementwise(lambda x: 0.5 * x * (1 + torch.tanh(0.5 * x)))
    stable = elementwise(lambda x: torch.relu(x) + torch.log(1 + torch.exp(-torch.abs(x))))
    total = elementwise(lambda x: torch.logsumexp(x, 1, keepdim=True))

    def shifted(x: Tensor) -> Tensor:
        top = x.amax(1, keepdim=True)
        return top + torch.log(torch.exp(x - top).sum(1, keepdim=True))

    return [
        Comparison(
            "silu, -15 to 15",
            line,
            lambda x: x / (1 + np.exp(-x)),
            (
                Form("silu", elementwise(nn.functional.silu)),
                Form("sigmoid(x) * x", written),
                Form("by tanh(x / 2)", tanh),
            ),
        ),
        Comparison(
            "softplus, -15 to 15",
            line,
            lambda x: np.logaddexp(0, x),
            (Form("softplus", elementwise(nn.functional.softplus)), Form("written out", stable)),
        ),
        Comparison(
            f"logsumexp of {WIDTH}, around 6",
            (6 + hidden).astype(np.float16),
            lambda x: np.log(np.exp(x).sum(1, keepdims=True)),
            (Form("reduce_log_sum_exp", total), Form("largest out first", elementwise(shifted))),
        ),
        Comparison("RMS norm, x of 1", hidden.astype(np.float16), norm, norms),
        Comparison("RMS norm, x of 1000", (1000 * hidden).astype(np.float16), norm, norms),
        Comparison("RMS norm, x of 0.001", (hidden / 1000).astype(np.float16), norm, norms),
        Comparison(
            f"sum of {TERMS} products, about 35,000",
            rising,
            lambda x: weight.astype(np.float64) @ x[:, :, 0].reshape(TERMS, 1),
            (
                Form("as it is", product(weight, 1)),
                Form("weights times 1/4", product(weight, 0.25), 0.25),
            ),
        ),
        Comparison(
            f"sum of {TERMS} products, 40,000 and back",
            cancelled,
            lambda x: halves.astype(np.float64) @ x[:, :, 0].reshape(TERMS, 1),
            (
                Form("one half after the other", product(halves, 1)),
                Form("terms of both halves in turn", product(halves[:, woven], 1)),
                Form("weights times 1/4", product(halves, 0.25), 0.25),
            ),
        ),
    ]


def saved(form: Form, shape: tuple[int, ...], path: Path) -> Path:
    traced = torch.jit.trace(form.made.eval(), torch.zeros(shape))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name="x", shape=shape, dtype=np.float16)],
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        skip_model_load=True,
        minimum_deployment_target=ct.target.iOS18,
    )
    model.save(str(path))
    return path


def print_gated_errors(draws: int = 200_000) -> None:
    """Relative L2 error of `silu(gate) * up`, both normal, for gates of several sizes."""
    torch.manual_seed(0)
    print("\n| gates of | silu * up | sigmoid * up * gate | by tanh | rounded once |")
    print("|---|---|---|---|---|")
    for size in (0.25, 0.5, 1.0, 2.0, 4.0):
        gate, up = to_fp16(torch.randn(draws) * size), to_fp16(torch.randn(draws))
        exact = nn.functional.silu(gate.double()) * up.double()
        half = to_fp16(0.5 * gate)
        forms = (
            look_up("silu", gate) * up,
            to_fp16(look_up("sigmoid", gate) * up) * gate,
            to_fp16(to_fp16(1 + look_up("tanh", half)) * half) * up,
            exact.float(),
        )
        errors = [(to_fp16(form).double() - exact).norm() / exact.norm() for form in forms]
        print(f"| {size:g} | " + " | ".join(f"{float(error):.1e}" for error in errors) + " |")


def main() -> None:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    print("| what | form | largest error | largest value | Inf or NaN |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(comparisons()):
            exact = case.exact(case.x.astype(np.float64)).ravel()
            for place, form in enumerate(case.forms):
                path = saved(form, case.x.shape, Path(folder) / f"{number}_{place}.mlpackage")
                function = load_package(path, runtime="reference", precision="engine")
                y = function.predict({"x": case.x})["y"].astype(np.float64).ravel() / form.factor
                finite = np.isfinite(y)
                error = np.abs(y - exact)[finite].max() if finite.any() else np.nan
                print(
                    f"| {case.what} | {form.label} | {error:.2g} | {np.abs(exact).max():.4g} "
                    f"| {int((~finite).sum()) or ''} |"
                )
    print_gated_errors()


if __name__ == "__main__":
    main()
