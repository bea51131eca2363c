"""Small real packages, made by coremltools on first use and shared by the tests of a session.

`package(name)` gives the path of one of `PACKAGES`. They are read-only: copy one
(`shutil.copytree`) to change it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mil_writer import write_compiled

from ane_moe.coreml_tools import ct, validating_once

TARGETS = {
    "ios15": ct.target.iOS15,
    "ios16": ct.target.iOS16,
    "ios17": ct.target.iOS17,
    "ios18": ct.target.iOS18,
}
PRECISIONS = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}


class Net(torch.nn.Module):
    """x [1, 8, 1, 4] -> [1, 16, 1, 4]: two convolutions large enough to be compressed, a norm and a
    softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Conv2d(8, 64, 1)
        self.down = torch.nn.Conv2d(64, 16, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.up(x))
        hidden = hidden * torch.rsqrt((hidden * hidden).mean(1, keepdim=True) + 1e-5)
        return torch.softmax(self.down(hidden), dim=1)


class Counter(torch.nn.Module):
    """Adds x [1, 4] to a state of the same shape and gives the sum, doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 2


@torch.jit.script
def _double_until_large(x: torch.Tensor) -> torch.Tensor:
    while bool(x.sum() < 100.0):
        x = x + x
    if bool(x.sum() > 150.0):  # noqa: SIM108 - becomes a `cond`
        x = x - 1.0
    else:
        x = x + 1.0
    return x


class Loop(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _double_until_large(x)


def _converted(
    module: torch.nn.Module, x: torch.Tensor, target: str, precision: str, **options: object
) -> object:
    traced = torch.jit.trace(module.eval(), x)
    options = {"inputs": [ct.TensorType(name="x", shape=options.pop("shape", x.shape))], **options}
    with validating_once():
        return ct.convert(
            traced,
            minimum_deployment_target=TARGETS[target],
            compute_precision=PRECISIONS[precision],
            outputs=[ct.TensorType(name="y")],
            skip_model_load=True,
            **options,
        )


def _net(target: str, precision: str = "fp16", **options: object) -> Callable[[Path], None]:
    return lambda path: _converted(
        Net(), torch.zeros(1, 8, 1, 4), target, precision, **options
    ).save(str(path))


def _compressed(target: str, *steps: tuple[Callable, object]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        model = _converted(Net(), torch.zeros(1, 8, 1, 4), target, "fp16")
        for index, (compress, config) in enumerate(steps):
            joint = {"joint_compression": True} if index else {}
            model = compress(
                model, ct.optimize.coreml.OptimizationConfig(global_config=config), **joint
            )
        model.save(str(path))

    return build


def _palettize(**options: object) -> tuple[Callable, object]:
    return ct.optimize.coreml.palettize_weights, ct.optimize.coreml.OpPalettizerConfig(
        weight_threshold=0, **options
    )


def _quantize(**options: object) -> tuple[Callable, object]:
    return (
        ct.optimize.coreml.linear_quantize_weights,
        ct.optimize.coreml.OpLinearQuantizerConfig(weight_threshold=0, **options),
    )


def _prune(target_sparsity: float = 0.5) -> tuple[Callable, object]:
    return (
        ct.optimize.coreml.prune_weights,
        ct.optimize.coreml.OpMagnitudePrunerConfig(
            target_sparsity=target_sparsity, weight_threshold=0
        ),
    )


def _stateful(path: Path) -> None:
    x = torch.zeros(1, 4)
    states = [
        ct.StateType(wrapped_type=ct.TensorType(shape=(1, 4), dtype=np.float16), name="total")
    ]
    _converted(Counter(), x, "ios18", "fp16", states=states).save(str(path))


def _multifunction(path: Path) -> None:
    parts = {"decode": 1, "prefill": 4}
    description = ct.utils.MultiFunctionDescriptor()
    for name, tokens in parts.items():
        part = path.with_name(f"{path.stem}_{name}.mlpackage")
        _converted(Net(), torch.zeros(1, 8, 1, tokens), "ios18", "fp16").save(str(part))
        description.add_function(str(part), src_function_name="main", target_function_name=name)
    description.default_function_name = "decode"
    ct.utils.save_multifunction(description, str(path))


def _classifier(path: Path) -> None:
    """An image in, a label and a dictionary of probabilities out."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    image = ct.ImageType(name="image", shape=(1, 3, 8, 8), scale=1 / 255)
    ct.convert(
        torch.jit.trace(module.eval(), torch.zeros(1, 3, 8, 8)),
        inputs=[image],
        skip_model_load=True,
        classifier_config=ct.ClassifierConfig(["a", "b", "c", "d"]),
        minimum_deployment_target=TARGETS["ios16"],
    ).save(str(path))


def _loop(path: Path) -> None:
    _converted(Loop(), torch.ones(1, 4), "ios16", "fp32").save(str(path))


PACKAGES: dict[str, Callable[[Path], None]] = {
    **{
        f"net_{target}_{precision}": _net(target, precision)
        for target in TARGETS
        for precision in PRECISIONS
    },
    "flexible": _net("ios17", shape=ct.Shape((1, 8, 1, ct.RangeDim(1, 16, default=4)))),
    "enumerated": _net("ios17", shape=ct.EnumeratedShapes([(1, 8, 1, 4), (1, 8, 1, 1)])),
    "lut4_ios16": _compressed("ios16", _palettize(nbits=4)),
    "lut6_ios18": _compressed("ios18", _palettize(nbits=6)),
    "lut3_ios18": _compressed("ios18", _palettize(nbits=3)),
    "lut4_grouped": _compressed(
        "ios18", _palettize(nbits=4, granularity="per_grouped_channel", group_size=8)
    ),
    "lut2_vector": _compressed("ios18", _palettize(nbits=2, cluster_dim=2)),
    "int8_ios16": _compressed("ios16", _quantize()),
    "int8_ios18": _compressed("ios18", _quantize()),
    "int4_block": _compressed(
        "ios18", _quantize(dtype="int4", granularity="per_block", block_size=8)
    ),
    "uint4_tensor": _compressed(
        "ios18", _quantize(dtype="uint4", mode="linear", granularity="per_tensor")
    ),
    "sparse_ios16": _compressed("ios16", _prune()),
    "sparse_ios18": _compressed("ios18", _prune()),
    "sparse_lut4": _compressed("ios18", _prune(), _palettize(nbits=4)),
    "sparse_int8": _compressed("ios18", _prune(), _quantize()),
    "lut4_int8": _compressed("ios18", _palettize(nbits=4), _quantize(granularity="per_tensor")),
    "stateful": _stateful,
    "multifunction": _multifunction,
    "loop": _loop,
    "classifier": _classifier,
}


def _pipeline(path: Path) -> None:
    """The net of `_net`, and a second one that takes the first 8 of its 16 channels."""
    first = _converted(Net(), torch.zeros(1, 8, 1, 4), "ios18", "fp16")

    class Half(torch.nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(y[:, :8] - 0.05) * 3

    second = ct.convert(
        torch.jit.trace(Half(), torch.zeros(1, 16, 1, 4)),
        skip_model_load=True,
        inputs=[ct.TensorType("y", (1, 16, 1, 4), np.float16)],
        outputs=[ct.TensorType("z")],
        minimum_deployment_target=TARGETS["ios18"],
    )
    ct.utils.make_pipeline(first, second).save(str(path))


COMPOSED = {"pipeline": _pipeline}


def build(name: str, folder: Path) -> Path:
    """A package of `PACKAGES` or `COMPOSED` in `folder`, or with the suffix .mlmodelc its compiled
    form."""
    plain = name.removesuffix(".mlmodelc")
    path = folder / f"{plain}.mlpackage"
    if not path.exists():
        torch.set_num_threads(1)
        with warnings.catch_warnings(action="ignore"):  # of channels that pruning left empty
            (PACKAGES | COMPOSED)[plain](path)
    if name == plain:
        return path
    compiled = folder / name
    return compiled if compiled.exists() else write_compiled(path, compiled)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of what `build` makes, made when first asked for."""
    folder = tmp_path_factory.mktemp("packages")
    return lambda name: build(name, folder)
