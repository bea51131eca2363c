"""Packages of programs of coremltools', operation by operation as they were built."""

from pathlib import Path
from typing import Any

from ane_moe.coreml_tools import ct


def saved(program: Any, path: Path, target: Any = ct.target.iOS17) -> Path:
    """The program as a package at `path`, in fp32."""
    ct.convert(
        program,
        minimum_deployment_target=target,
        skip_model_load=True,
        compute_precision=ct.precision.FLOAT32,
    ).save(str(path))
    return path
