"""A small package as our shards are: fp16 in and out, two functions over one copy of the weights
and one state."""

from pathlib import Path

import numpy as np

from ane_moe.coreml_tools import ct

mb, types = ct.converters.mil.mil.Builder, ct.converters.mil.mil.types

CHANNELS = 4
CACHE = 32
FUNCTIONS = {"decode": 1, "prefill": 3}  # name -> tokens in a call


def weight() -> np.ndarray:
    """[out, in, 1, 1] fp16."""
    return np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float16)


def expected(x: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `accumulator` computes, fp64: (y, the state after)."""
    total = total + x.astype(np.float64).sum(axis=3, keepdims=True)
    y = np.einsum("oi,bihw->bohw", weight()[:, :, 0, 0].astype(np.float64), x.astype(np.float64))
    return y + total[:, :, :, :1], total


def accumulator(path: Path) -> Path:
    """x [1,4,1,T] -> y = conv(x) + total [1,4,1,T], where the state total [1,4,1,32] has x's sum
    over T added first."""
    description = ct.utils.MultiFunctionDescriptor()
    for name, tokens in FUNCTIONS.items():
        part = path.with_name(f"{path.stem}_{name}.mlpackage")
        _convert(tokens).save(str(part))
        description.add_function(str(part), src_function_name="main", target_function_name=name)
    description.default_function_name = "decode"
    ct.utils.save_multifunction(description, str(path))
    return path


def single(path: Path) -> Path:
    """The decode function alone, as `main`."""
    _convert(1).save(str(path))
    return path


def _convert(tokens: int) -> ct.models.MLModel:
    @mb.program(
        input_specs=[
            mb.TensorSpec((1, CHANNELS, 1, tokens), dtype=types.fp16),
            mb.StateTensorSpec((1, CHANNELS, 1, CACHE), dtype=types.fp16),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(x, total):  # the names of the features
        added = mb.add(x=mb.read_state(input=total), y=mb.reduce_sum(x=x, axes=[3], keep_dims=True))
        kept = mb.coreml_update_state(state=total, value=added)
        first = mb.slice_by_size(x=kept, begin=[0, 0, 0, 0], size=[1, CHANNELS, 1, 1])
        return mb.add(x=mb.conv(x=x, weight=weight()), y=first, name="y")

    return ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        skip_model_load=True,
    )
