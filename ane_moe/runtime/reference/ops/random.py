"""Random tensors.

With a seed, a loaded function draws the same sequence of results, call after call; without,
another each time. The numbers are PyTorch's: Core ML's own generator is not documented, so only
the distributions agree.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ane_moe.mlprogram.program import TensorType
from ane_moe.runtime.reference.dtypes import NUMPY, torch_dtype
from ane_moe.runtime.reference.ops.table import Kernel, Op

Out = Sequence[TensorType]
UNSEEDED = -1


def _generator(seed: int) -> torch.Generator:
    generator = torch.Generator()
    if seed == UNSEEDED:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _drawn(draw: Callable[..., Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """fp32 numbers of `draw` in the shape that is given as a tensor."""
    generator = _generator(seed)
    return lambda shape: draw(shape.tolist(), generator=generator, dtype=torch.float32)


def _normal(mean: float = 0.0, stddev: float = 1.0, seed: int = UNSEEDED) -> Kernel:
    drawn = _drawn(torch.randn, seed)
    return lambda shape: mean + stddev * drawn(shape)


def _uniform(out: Out, low: float = 0.0, high: float = 1.0, seed: int = UNSEEDED) -> Kernel:
    if high < low:
        raise ValueError(f"the interval from {low} to {high} is empty")
    drawn, dtype = _drawn(torch.rand, seed), torch_dtype(out[0].dtype)
    held = NUMPY[out[0].dtype]
    # Rounding must not reach `high`, which is excluded.
    largest = float(np.nextafter(held(high), held(low)))
    return lambda shape: (low + (high - low) * drawn(shape)).to(dtype).clamp(max=largest)


def _bernoulli(prob: float = 0.5, seed: int = UNSEEDED) -> Kernel:
    drawn = _drawn(torch.rand, seed)
    return lambda shape: (drawn(shape) < prob).to(torch.float32)


def _categorical(mode: str = "logits", size: int = 1, seed: int = UNSEEDED) -> Kernel:
    if mode not in ("logits", "probs"):
        raise ValueError(f"unknown mode {mode}")
    generator = _generator(seed)

    def kernel(x: Tensor) -> Tensor:
        weights = torch.softmax(x.float(), -1) if mode == "logits" else x.float()
        rows = weights.reshape(-1, x.shape[-1])
        drawn = torch.multinomial(rows, size, replacement=True, generator=generator)
        return drawn.reshape(*x.shape[:-1], size).to(torch.float32)

    return kernel


SEQUENCE = "a seed starts a sequence that goes on from call to call; the numbers are not Core ML's"

OPS = (
    Op("random_normal", _normal, "shape", varies=True, note=SEQUENCE),
    Op("random_uniform", _uniform, "shape", varies=True, note=SEQUENCE),
    Op("random_bernoulli", _bernoulli, "shape", varies=True, note=SEQUENCE),
    Op("random_categorical", _categorical, varies=True, note=SEQUENCE),
)
