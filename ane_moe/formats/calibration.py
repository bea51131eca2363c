"""What calibration text showed: what enters every matrix, how often each expert was chosen, how
much each block adds.

calibration.safetensors, N tokens:

    inputs.<activation>         fp32 (columns,)     mean squares of what enters a matrix
    counts.layer_<L>            int64 (experts,)    tokens that chose each expert
    energy.layer_<L>            fp32 (2,)           mean squared lengths of what attention and
    feed-forward add
    energy.final                fp32 (1,)           and of the hidden state before the head
    range.layer_<L>             fp32 (5,)           largest magnitudes (original/ranges.py)

An activation is called as the tensors that read it are, with the name of `Weight.reads` for a path:
`layers.3.attn.x` enters q, k and v. An expert that no token chose has none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ane_moe.errors import UserError
from ane_moe.files import replaced
from ane_moe.model.weight import WeightName

FILE_NAME = "calibration.safetensors"
METADATA = "ane_moe_calibration_4"


@dataclass(frozen=True)
class Calibration:
    """`moments` by activation, `counts`, `energies` and `ranges` by layer, over `tokens` tokens;
    `of` tells what it was made from."""

    moments: Mapping[WeightName, np.ndarray]
    counts: Mapping[int, np.ndarray]
    energies: Mapping[int, np.ndarray]
    ranges: Mapping[int, np.ndarray]
    final_energy: float
    tokens: int
    of: str

    def write(self, path: Path) -> None:
        """Write it atomically."""
        tensors = {
            f"inputs.{name}": moments.astype(np.float32) for name, moments in self.moments.items()
        }
        tensors |= {
            f"counts.layer_{layer}": counts.astype(np.int64)
            for layer, counts in self.counts.items()
        }
        tensors |= {
            f"energy.layer_{layer}": pair.astype(np.float32)
            for layer, pair in self.energies.items()
        }
        tensors |= {
            f"range.layer_{layer}": found.astype(np.float32) for layer, found in self.ranges.items()
        }
        tensors["energy.final"] = np.array([self.final_energy], np.float32)
        with replaced(path) as temporary:
            save_file(
                tensors, temporary, {METADATA: json.dumps({"tokens": self.tokens, "of": self.of})}
            )


def is_calibration_of(path: Path, digest: str) -> bool:
    """Whether the calibration file was made from what `digest` tells; False for one that cannot be
    read."""
    try:
        return Moments(path).of == digest
    except UserError:
        return False


class Moments:
    """Reads the moments of single matrices from a calibration file. Raises UserError when it is
    damaged."""

    def __init__(self, path: Path):
        try:
            # Its header names every matrix: parsed once.
            self._file = safe_open(path, framework="numpy")
            self._names = set(self._file.keys())
            about = json.loads((self._file.metadata() or {})[METADATA])
            self.tokens, self.of = int(about["tokens"]), str(about["of"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read", str(error), "delete it and convert again"
            ) from None
        self._path = path

    def find(self, activation: WeightName, columns: int) -> np.ndarray | None:
        """fp32 `(columns,)` for what enters a matrix; None where calibration did not meet it."""
        name = f"inputs.{activation}"
        if name not in self._names:
            return None
        moments: np.ndarray = self._file.get_tensor(name)
        if moments.shape != (columns,) or not np.isfinite(moments).all() or moments.min() < 0:
            raise UserError(
                f"{self._path} does not fit {activation}",
                f"{moments.shape} for {columns} columns",
                "delete it and convert again",
            )
        return moments if moments.any() else None

    def ranges(self) -> dict[int, list[float]]:
        """Largest magnitudes by layer, as a LayerRange has them."""
        start = "range.layer_"
        layers = sorted(int(n.removeprefix(start)) for n in self._names if n.startswith(start))
        return {layer: self._file.get_tensor(f"{start}{layer}").tolist() for layer in layers}

    def share(self, tensor: WeightName) -> float:
        """Share of the energy of the last hidden state that comes through a matrix: how much of a
        relative error of its outputs arrives at the head, if later layers neither damp nor amplify
        it. 1 for the head itself."""
        if tensor.layer is None:
            return 1.0
        block = ("attn", "ffn").index(tensor.part)
        added = self._file.get_tensor(f"energy.layer_{tensor.layer}")[block]
        energy = added / self._file.get_tensor("energy.final")[0]
        if tensor.expert is None:
            return float(energy)
        counts = self._file.get_tensor(f"counts.layer_{tensor.layer}")
        return float(energy * counts[tensor.expert] / counts.sum())
