"""A routing trace: which experts every token chose, with which weights, layer by layer.
docs/routing.md has the schema.

N = tokens, k = experts per token, E = experts of the layer, P = passages the tokens come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import named_by_user
from ane_moe.npz_file import read_npz

FORMAT = 1
MAX_BYTES = 1 << 32
_AGAIN = "make one with `ane-moe trace`"


@dataclass(frozen=True)
class LayerRouting:
    """`chosen` int16 `[N,k]`, by falling weight; `weights` fp32 `[N,k]`, 0 where fewer than k were
    chosen (an fp16 gate that vanished). `experts` is E; `expert_bytes` what one expert's weights
    take as stored and `expert_weights` how many they are, 0 when unknown."""

    experts: int
    chosen: np.ndarray
    weights: np.ndarray
    expert_bytes: int = 0
    expert_weights: int = 0

    def mask(self) -> np.ndarray:
        """Whether each token chose each expert, bool `[N,E]`."""
        chosen = np.zeros((len(self.chosen), self.experts), bool)
        np.put_along_axis(chosen, self.chosen.astype(np.int64), self.weights > 0, axis=1)
        return chosen


@dataclass(frozen=True)
class RoutingTrace:
    """`tokens` int32 `[N]`, `starts` int64 `[P]` the first token of each passage; `source` says
    what was run."""

    family: str
    source: str
    tokens: np.ndarray
    starts: np.ndarray
    layers: Mapping[int, LayerRouting]

    @property
    def passages(self) -> list[slice]:
        """Tokens of each passage."""
        ends = [*self.starts[1:].tolist(), len(self.tokens)]
        return [slice(start, end) for start, end in zip(self.starts.tolist(), ends, strict=True)]

    def first(self, tokens: int) -> "RoutingTrace":
        """Its first tokens."""
        layers = {
            index: replace(one, chosen=one.chosen[:tokens], weights=one.weights[:tokens])
            for index, one in self.layers.items()
        }
        starts = self.starts[self.starts < tokens]
        return replace(self, tokens=self.tokens[:tokens], starts=starts, layers=layers)


def by_weight(chosen: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`chosen [N,k]` and `weights [N,k]` by falling weight, the lower expert first at a tie."""
    order = np.lexsort((chosen, -weights), axis=1)
    chosen, weights = np.take_along_axis(chosen, order, 1), np.take_along_axis(weights, order, 1)
    return chosen.astype(np.int16), weights.astype(np.float32)


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write an .npz atomically. Raises UserError when the file cannot be written."""
    indices = sorted(trace.layers)
    arrays: dict[str, np.ndarray] = {
        "format": np.array(FORMAT, np.int64),
        "family": np.array(trace.family),
        "source": np.array(trace.source),
        "tokens": trace.tokens.astype(np.int32),
        "starts": trace.starts.astype(np.int64),
        "layers": np.array(indices, np.int32),
        "experts": np.array([trace.layers[index].experts for index in indices], np.int32),
        "expert_bytes": np.array([trace.layers[index].expert_bytes for index in indices], np.int64),
        "expert_weights": np.array(
            [trace.layers[index].expert_weights for index in indices], np.int64
        ),
    }
    for index in indices:
        arrays |= {
            f"layer_{index:03d}.chosen": trace.layers[index].chosen,
            f"layer_{index:03d}.weights": trace.layers[index].weights,
        }
    with named_by_user(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_trace(path: Path) -> RoutingTrace:
    """Read and check a trace. Raises UserError when it is none, damaged, or larger than 4 GiB
    unpacked."""
    try:
        return _parsed(read_npz(path, MAX_BYTES))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read as a routing trace", f"{type(error).__name__}: {error}", _AGAIN
        ) from None


def _parsed(arrays: Any) -> RoutingTrace:
    if int(arrays["format"]) != FORMAT:
        raise ValueError(f"format {arrays['format']}, this version reads {FORMAT}")
    tokens, starts = arrays["tokens"], arrays["starts"]
    if (
        tokens.ndim != 1
        or starts.ndim != 1
        or not len(starts)
        or starts[0] != 0
        or (np.diff(starts) <= 0).any()
        or starts[-1] >= len(tokens)
    ):
        raise ValueError("passages and tokens do not fit together")
    layers = {}
    facts = (
        arrays[name].tolist() for name in ("layers", "experts", "expert_bytes", "expert_weights")
    )
    for index, experts, size, count in zip(*facts, strict=True):
        chosen, weights = arrays[f"layer_{index:03d}.chosen"], arrays[f"layer_{index:03d}.weights"]
        if (
            chosen.dtype != np.int16
            or weights.dtype != np.float32
            or chosen.shape != weights.shape
            or chosen.ndim != 2
            or len(chosen) != len(tokens)
            or min(size, count) < 0
        ):
            raise ValueError(
                f"layer {index} has {chosen.dtype} {chosen.shape} and {weights.dtype} "
                f"{weights.shape}"
            )
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < experts:
            raise ValueError(f"layer {index} names an expert it does not have")
        if not np.isfinite(weights).all():
            raise ValueError(f"layer {index} has weights that are not finite")
        layers[index] = LayerRouting(experts, chosen, weights, size, count)
    if not layers:
        raise ValueError("no layers")
    return RoutingTrace(str(arrays["family"]), str(arrays["source"]), tokens, starts, layers)
