"""Digests of what small checkpoints are converted to: one for each family, and for each weight
format.

`python -m tests.conversion.recorded_bytes` records them anew, after bytes were changed on purpose.
"""

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ane_moe.formats.recipe import FP16, find_recipe
from tests.models import FAMILIES, make_model, save_checkpoint
from tests.verification.tiny import edit_tensors, tiny_conversion

RECORDED = Path(__file__).with_suffix(".json")
# What else decides the bytes: the graph, and the tools that a content key names.
DEPENDS_ON = ("ane-moe", "coremltools", "numpy", "protobuf", "scipy", "torch")
FORMATS = (
    *("int8", "int4-channel", "int4-block32", "apple2", "lut8", "lut6", "lut4", "lut3", "lut2"),
    *("lut4-tensor", "lut4-g32+scale", "lut8-v2", "sparse50", "sparse30+int8", "sparse50+lut4"),
)
# A conversion's name -> (family, type of the stored weights, options).
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    **{family: (family, torch.bfloat16, {}) for family in FAMILIES},
    **{
        f"mixtral as {name}": ("mixtral", torch.bfloat16, {"recipe": find_recipe(name)})
        for name in FORMATS
    },
    "mixtral of fp32": ("mixtral", torch.float32, {}),
    "mixtral of fp16": ("mixtral", torch.float16, {"recipe": find_recipe("int8")}),
    "mixtral with directions apart": (
        "mixtral",
        torch.bfloat16,
        {"recipe": find_recipe("lut4", rank=4)},
    ),
    "granitemoe as int8": ("granitemoe", torch.bfloat16, {"recipe": find_recipe("int8")}),
    "qwen3_moe sparse": ("qwen3_moe", torch.bfloat16, {"routing": "sparse", "prefill": 16}),
    "qwen3_moe split": ("qwen3_moe", torch.bfloat16, {"max_shard_mb": 0}),
}


def versions() -> dict[str, str]:
    return {name: version(name) for name in DEPENDS_ON}


def checkpoint(family: str, dtype: torch.dtype, folder: Path) -> Path:
    """A checkpoint whose values come from whole numbers: torch's normal ones depend on the CPU."""
    save_checkpoint(make_model(family), folder)

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        random = np.random.default_rng(0)
        for name in sorted(tensors):
            shape = tensors[name].shape
            numbers = random.integers(-2000, 2000, shape) * random.integers(0, 2000, shape)
            tensors[name] = torch.from_numpy(numbers / 2.0**24).to(dtype)

    edit_tensors(folder, plain)
    return folder


def digests(name: str, folder: Path) -> dict[str, str]:
    """sha256 of all that a conversion of CASES writes: of `weights`, and of `programs`."""
    family, dtype, options = CASES[name]
    out = folder / "out"
    tiny_conversion(
        checkpoint(family, dtype, folder / "checkpoint"), out, **{"recipe": FP16, **options}
    )
    hashers = {"weights": hashlib.sha256(), "programs": hashlib.sha256()}
    for path in sorted(out.rglob("*")):
        kind = {".bin": "weights", ".mlmodel": "programs"}.get(path.suffix)
        if kind or path.name == "Manifest.json":
            hasher = hashers[kind or "programs"]
            hasher.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return {kind: hasher.hexdigest() for kind, hasher in hashers.items()}


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def main() -> None:
    made = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made[name] = digests(name, Path(folder))
    RECORDED.write_text(json.dumps({"versions": versions(), "digests": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
