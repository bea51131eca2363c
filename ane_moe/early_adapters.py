"""Low-rank adapters that say from a hidden state what it will be some layers later, so that experts
can be guessed and tokens drafted early. `ane-moe align` fits them (`routing/alignment.py`),
`convert --early` puts them into attention shards, and a host may apply them itself.

In the manner of M2R2 (arXiv 2502.02040), of which the abstract was read. d = d_model, r = rank.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import named_by_user
from ane_moe.npz_file import read_npz
from ane_moe.wording import counted

FORMAT = 1
MAX_BYTES = 1 << 31
EPS = 1e-6  # of a mean square that is 0


@dataclass(frozen=True)
class Adapter:
    """`down` fp32 `[d,r]` and `up` fp32 `[r,d]`."""

    down: np.ndarray
    up: np.ndarray

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states `[...,d]` some layers later, fp32, but for their scale."""
        level = levelled(hidden)
        return level + level @ self.down @ self.up

    def before(self, rows: np.ndarray) -> np.ndarray:
        """A matrix `[n,d]` and this one in front of it in one, fp32 `[n,d]`: of a levelled state it
        gives what `rows` give of the adapted one."""
        with np.errstate(over="ignore", invalid="ignore"):  # infinite, as whoever asks will see
            return rows + rows @ self.up.T @ self.down.T

    @property
    def digest(self) -> str:
        """sha256 (hex) of its numbers."""
        hasher = hashlib.sha256(repr(self.down.shape).encode())
        for one in (self.down, self.up):
            hasher.update(np.ascontiguousarray(one).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Adapters:
    """`ahead`: by layer and how many layers with experts lie from it to the one that is meant, from
    what one's experts add to, to what the other's do. `exits`: by layer, from what leaves it to
    what leaves the last one."""

    d_model: int
    ahead: Mapping[tuple[int, int], Adapter] = field(default_factory=dict)
    exits: Mapping[int, Adapter] = field(default_factory=dict)


def levelled(hidden: np.ndarray) -> np.ndarray:
    """Hidden states `[...,d]` with a mean square of 1, fp32: no norm sees the difference."""
    exact = hidden.astype(np.float32)
    return exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + EPS)


def write_adapters(adapters: Adapters, path: Path) -> None:
    """Write an .npz atomically. Raises UserError when the file cannot be written."""
    arrays = {"format": np.array(FORMAT), "d_model": np.array(adapters.d_model)}
    named = {f"ahead.{layer}.{far}": one for (layer, far), one in adapters.ahead.items()}
    named |= {f"exit.{layer}": one for layer, one in adapters.exits.items()}
    for name, one in named.items():
        arrays |= {f"{name}.down": one.down, f"{name}.up": one.up}
    with named_by_user(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_adapters(path: Path, d_model: int) -> Adapters:
    """Read and check adapters of a model of this width. Raises UserError when the file holds none,
    or is damaged."""
    try:
        arrays = read_npz(path, MAX_BYTES)
        found = int(arrays["d_model"])
        adapters = _parsed(arrays, found)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read as adapters of this model",
            f"{type(error).__name__}: {error}",
            "make them with `ane-moe align`",
        ) from None
    if found != d_model:
        raise UserError(
            f"{path} holds adapters of another model",
            f"for hidden states of {counted(found, 'channel')}",
            f"this model's have {d_model}: make them with `ane-moe align` on it",
        )
    return adapters


def _parsed(arrays: Mapping[str, np.ndarray], d_model: int) -> Adapters:
    if int(arrays["format"]) != FORMAT:
        raise ValueError(f"format {arrays['format']}")
    ahead, exits = {}, {}
    for name in sorted(name.removesuffix(".down") for name in arrays if name.endswith(".down")):
        kind, *places = name.split(".")
        adapter = Adapter(arrays[f"{name}.down"], arrays[f"{name}.up"])
        _require_sound(adapter, d_model, name)
        if kind == "exit":
            (layer,) = map(int, places)
            exits[layer] = adapter
        else:
            layer, far = map(int, places)
            ahead[layer, far] = adapter
    return Adapters(d_model, ahead, exits)


def _require_sound(adapter: Adapter, d_model: int, name: str) -> None:
    down, up = adapter.down, adapter.up
    shapes = (down.shape, up.shape[::-1])
    if (
        {down.dtype, up.dtype} != {np.dtype(np.float32)}
        or shapes[0] != shapes[1]
        or down.ndim != 2
        or down.shape[0] != d_model
        or not down.size
        or not (np.isfinite(down).all() and np.isfinite(up).all())
    ):
        raise ValueError(f"{name} has {down.dtype} {down.shape} and {up.dtype} {up.shape}")
