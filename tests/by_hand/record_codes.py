"""Writes tests/checkpoints/recorded_codes.json: small matrices in quantised forms of libraries that
the tests do not install, and the digest of the fp32 numbers that those decode.

    python tests/by_hand/record_codes.py bitsandbytes     (needs bitsandbytes and torch)
    python tests/by_hand/record_codes.py mlx              (needs mlx)

Each call replaces the entries of its own library.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "checkpoints" / "recorded_codes.json"
# Rows of whole runs: of others, the CPU code of bitsandbytes 0.50 takes the scales wrong.
MATRIX = np.random.default_rng(0).standard_normal((4, 128), np.float32)
TALL = np.random.default_rng(0).standard_normal((132, 128), np.float32)  # two runs of nested scales
KINDS = {"uint8": "U8", "float32": "F32", "uint32": "U32"}


def stored(array: np.ndarray) -> dict[str, Any]:
    dtype = KINDS[str(array.dtype)]
    return {"dtype": dtype, "shape": list(array.shape), "hex": array.tobytes().hex()}


def entry(config: dict[str, Any], tensors: dict[str, np.ndarray], numbers: np.ndarray) -> Any:
    named = {name: stored(np.asarray(array)) for name, array in tensors.items()}
    digest = hashlib.sha256(np.ascontiguousarray(numbers, np.float32).tobytes()).hexdigest()
    return {"config": config, "tensors": named, "sha256": digest}


def bitsandbytes() -> dict[str, Any]:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    entries = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            matrix = torch.from_numpy(TALL if nested else MATRIX)
            codes, state = quantize_4bit(
                matrix, blocksize=64, compress_statistics=nested, quant_type=kind
            )
            tensors = {f"weight.{name}": t.numpy() for name, t in state.as_dict(True).items()}
            config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
            numbers = dequantize_4bit(codes, state).numpy()
            name = f"bitsandbytes {kind}{', nested' * nested}"
            entries[name] = entry(config, {"weight": codes.numpy(), **tensors}, numbers)
    return entries


def mlx() -> dict[str, Any]:
    import mlx.core as mx

    entries = {}
    forms: list[dict[str, Any]] = [
        {"group_size": 32, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)
    ]
    for form in [*forms, {"group_size": 32, "bits": 4, "mode": "mxfp4"}]:
        codes, *others = mx.quantize(mx.array(MATRIX), **form)
        numbers = np.array(mx.dequantize(codes, *others, **form).astype(mx.float32))
        tensors = dict(zip(("weight", "scales", "biases"), (codes, *others), strict=False))
        name = f"mlx {form['mode']} {form['bits']} bit"
        entries[name] = entry(
            {"quantization": form}, {name: np.array(t) for name, t in tensors.items()}, numbers
        )
    return entries


def main() -> None:
    library = sys.argv[1]
    made = {"bitsandbytes": bitsandbytes, "mlx": mlx}[library]()
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    kept = {name: entry for name, entry in kept.items() if not name.startswith(library)}
    source = f"{library} {version(library)}"
    kept |= {name: {"source": source, **entry} for name, entry in made.items()}
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
