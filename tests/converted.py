"""Packages that coremltools makes of torch modules."""

from pathlib import Path

import numpy as np
import torch

from ane_moe.coreml_tools import ct


def save_converted(module: torch.nn.Module, inputs: dict[str, tuple[int, ...]], path: Path) -> None:
    """`y`, fp16, of a module called with fp16 `inputs` of these shapes, in their order."""
    traced = torch.jit.trace(module, tuple(map(torch.zeros, inputs.values())))
    ct.convert(
        traced,
        inputs=[
            ct.TensorType(name=name, shape=shape, dtype=np.float16)
            for name, shape in inputs.items()
        ],
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        skip_model_load=True,
        minimum_deployment_target=ct.target.iOS18,
    ).save(str(path))
