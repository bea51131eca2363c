"""Small packages that hold, between them, an operation for every row of `estimates.toml` that our
graphs meet: loading them makes Core ML write down what it estimates on this machine."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.coreml_tools import ct

mb, types = ct.converters.mil.mil.Builder, ct.converters.mil.mil.types
# Sizes at which a product of matrices falls into other leaves: from reading weights to computing.
TOKENS, WIDTHS = (1, 16, 64, 128), (256, 512, 1024)
STREAM = (1, 64, 32, 32)
Shape = tuple[int, ...]


class _Probe:
    """An operation of its own: `kind`, of an input of this shape, with these parameters."""

    def __init__(self, kind: str, of: Shape, *, both: bool = False, **given: Any):
        self.kind, self.of, self.both, self.given = kind, of, both, given

    def __call__(self, x: Any, name: str) -> Any:
        operation: Callable[..., Any] = getattr(mb, self.kind)
        if self.kind == "concat":
            return operation(values=[x, x], axis=1, name=name)
        if self.kind == "scaled_dot_product_attention":
            return operation(query=x, key=x, value=x, name=name)
        return operation(x=x, name=name, **({"y": x} if self.both else {}), **self.given)


def write_probes(folder: Path) -> list[tuple[Path, str]]:
    """Write them into `folder`: (path, name), as `measure` takes them."""
    groups = {
        "convolutions": _convolutions(),
        "products": _products(),
        "arithmetic": _arithmetic(),
        "movement": _movement(),
    }
    paths = {name: folder / f"{name}.mlpackage" for name in groups}
    return [(_write(path, list(groups[name])), name) for name, path in paths.items()]


def _convolutions() -> Iterator[_Probe]:
    for width in WIDTHS:
        for tokens in TOKENS:
            yield _Probe("conv", (1, width, 1, tokens), weight=_weight(width, width, 1, 1))
    yield _Probe("conv", STREAM, weight=_weight(64, 64, 3, 3), pad_type="same")
    yield _Probe("conv_transpose", STREAM, weight=_weight(64, 64, 2, 2), strides=[2, 2])


def _products() -> Iterator[_Probe]:
    for width in WIDTHS:
        for tokens in TOKENS:
            yield _Probe("linear", (1, tokens, width), weight=_weight(2 * width, width))
    for side in (32, 128, 512):
        yield _Probe("matmul", (1, 4, side, side), both=True)
    yield _Probe("scaled_dot_product_attention", (1, 8, 256, 64))


def _arithmetic() -> Iterator[_Probe]:
    for kind in ("add", "sub", "mul", "real_div", "maximum"):
        yield _Probe(kind, STREAM, both=True)
    for kind in ("relu", "sigmoid", "abs", "silu", "rsqrt"):
        yield _Probe(kind, STREAM)
    yield _Probe("gelu", STREAM, mode="EXACT")
    yield _Probe("clip", STREAM, alpha=np.float16(0), beta=np.float16(1))
    yield _Probe("softmax", STREAM, axis=-1)
    yield _Probe("layer_norm", (1, 32, 512), axes=[2])
    for kind in ("reduce_mean", "reduce_max", "reduce_sum"):
        yield _Probe(kind, STREAM, axes=[1], keep_dims=True)


def _movement() -> Iterator[_Probe]:
    yield _Probe("concat", STREAM)
    yield _Probe("transpose", STREAM, perm=[0, 1, 3, 2])
    yield _Probe("transpose", STREAM, perm=[1, 0, 2, 3])
    yield _Probe("reshape", STREAM, shape=[1, 64, 1, 1024])
    yield _Probe("slice_by_index", STREAM, begin=[0, 0, 0, 0], end=[1, 32, 32, 32])
    yield _Probe("gather", STREAM, indices=np.array([0, 2, 4], np.int32), axis=1)
    yield _Probe("upsample_bilinear", STREAM, scale_factor_height=2, scale_factor_width=2)


def _weight(*shape: int) -> np.ndarray:
    """Numbers that nothing folds away."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def _write(path: Path, probes: list[_Probe]) -> Path:
    names = [f"x_{at}" for at in range(len(probes))]
    specs = [mb.TensorSpec(probe.of, dtype=types.fp16) for probe in probes]
    makers = [partial(probe, name=f"{probe.kind}_{at}") for at, probe in enumerate(probes)]
    # coremltools reads the inputs' names off the function's own arguments.
    function = eval(
        f"lambda {', '.join(names)}: compute([{', '.join(names)}])",
        {"compute": partial(_computed, makers)},
    )
    model = ct.convert(
        mb.program(input_specs=specs, opset_version=ct.target.iOS18)(function),
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def _computed(makers: Iterable[Callable[[Any], Any]], values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(make(value) for make, value in zip(makers, values, strict=True))
