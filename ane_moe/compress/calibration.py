"""What calibration text showed: what enters every matrix, how often each expert was chosen, how much each block adds.

calibration.safetensors, N tokens:

    inputs.<our tensor name>    fp32 (columns,)     mean squares of the inputs of a matrix
    counts.layer_<L>            int64 (experts,)    tokens that chose each expert
    energy.layer_<L>            fp32 (2,)           mean squared lengths of what attention and feed-forward add
    energy.final                fp32 (1,)           and of the hidden state before the head

Of matrices with the same input only the first is there (gate for up; q for k and v). An expert that no token chose has
none.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ane_moe.errors import UserError

FILE_NAME = "calibration.safetensors"
METADATA = "ane_moe_calibration"
SAME_INPUT = {"up": "gate", "k": "q", "v": "q"}


@dataclass(frozen=True)
class Calibration:
    """`moments` by our tensor name, `counts` and `energies` by layer, over `tokens` tokens; `of` tells what it was made
    from."""

    moments: Mapping[str, np.ndarray]
    counts: Mapping[int, np.ndarray]
    energies: Mapping[int, np.ndarray]
    final_energy: float
    tokens: int
    of: str

    def write(self, path: Path) -> None:
        """Write it atomically."""
        tensors = {f"inputs.{name}": moments.astype(np.float32) for name, moments in self.moments.items()}
        tensors |= {f"counts.layer_{layer}": counts.astype(np.int64) for layer, counts in self.counts.items()}
        tensors |= {f"energy.layer_{layer}": pair.astype(np.float32) for layer, pair in self.energies.items()}
        tensors["energy.final"] = np.array([self.final_energy], np.float32)
        temporary = path.with_name(f".writing-{path.name}")
        save_file(tensors, temporary, {METADATA: json.dumps({"tokens": self.tokens, "of": self.of})})
        os.replace(temporary, path)


class Moments:
    """Reads the moments of single matrices from a calibration file. Raises UserError when it is damaged."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="numpy")     # its header names every matrix: parsed once
            self._names = set(self._file.keys())
            about = json.loads((self._file.metadata() or {})[METADATA])
            self.tokens, self.of = int(about["tokens"]), str(about["of"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read", str(error), "delete it and convert again") from None
        self._path = path

    def find(self, tensor: str, columns: int) -> np.ndarray | None:
        """fp32 `(columns,)` for one of our tensors; None where calibration did not meet it."""
        name = re.sub(r"\.(up|k|v)\.weight$", lambda found: f".{SAME_INPUT[found[1]]}.weight", tensor)
        if f"inputs.{name}" not in self._names:
            return None
        moments: np.ndarray = self._file.get_tensor(f"inputs.{name}")
        if moments.shape != (columns,) or not np.isfinite(moments).all() or moments.min() < 0:
            raise UserError(f"{self._path} does not fit {tensor}", f"{moments.shape} for {columns} columns",
                            "delete it and convert again")
        return moments if moments.any() else None

    def weight(self, tensor: str) -> float:
        """Share of the energy of the last hidden state that comes through a matrix: how much of a relative error of
        its outputs arrives at the head, if later layers neither damp nor amplify it. 1 for the head itself."""
        found = re.match(r"layers\.(\d+)\.(attn|ffn)\.(?:experts\.(\d+)\.)?", tensor)
        if found is None:
            return 1.0
        layer, block, expert = found[1], ("attn", "ffn").index(found[2]), found[3]
        energy = self._file.get_tensor(f"energy.layer_{layer}")[block] / self._file.get_tensor("energy.final")[0]
        if expert is None:
            return float(energy)
        counts = self._file.get_tensor(f"counts.layer_{layer}")
        return float(energy * counts[int(expert)] / counts.sum())
