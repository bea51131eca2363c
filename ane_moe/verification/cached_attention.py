"""One attention shard and its cache, fed hidden states instead of tokens. T = tokens in a call, d = d_model."""

from typing import Any

import numpy as np

from ane_moe.loop.buffers import Buffers, by_channel, rope_rows
from ane_moe.manifest import Manifest, Shard
from ane_moe.runtime.interface import LoadedFunction


class CachedAttention:
    """Functions of one shard on one sequence; they share the cache, as in generation."""

    def __init__(self, manifest: Manifest, shard: Shard, functions: dict[str, LoadedFunction]):
        self._shard, self._functions = shard, functions
        self._explicit = manifest.state == "explicit"
        ropes = {} if shard.rope is None else {shard.rope: rope_rows(manifest, shard.rope)}
        embed = np.zeros((1, manifest.d_model), np.float16)
        self._buffers = {one.name: Buffers(manifest, one.tokens, embed, [shard.window], ropes)
                         for one in shard.functions}
        self.start()

    def start(self) -> None:
        """Begin another sequence with an empty cache."""
        self._position = 0
        self._caches: dict[str, np.ndarray] = {}
        self._state: Any = None
        if self._explicit:
            self._caches = {name: np.zeros(shape, np.float16) for name, shape in self._shard.states.items()}
        else:
            self._state = next(iter(self._functions.values())).make_state()

    def run(self, function: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """Go on with `x` fp16 `[N,d]` in chunks of T, the last one padded; outputs but for caches as `[N,C]`."""
        buffers = self._buffers[function]
        collected: dict[str, list[np.ndarray]] = {}
        for first in range(0, len(x), buffers.tokens):
            chunk = x[first:first + buffers.tokens]
            buffers.place([0] * len(chunk), self._position)
            buffers.columns[:, :len(chunk)] = chunk.T
            output = self._functions[function].predict(self._features(buffers), self._state)
            self._caches = {name: output[f"{name}_out"] for name in self._caches}
            self._position += len(chunk)
            for name in output.keys() - {f"{name}_out" for name in self._shard.states}:
                collected.setdefault(name, []).append(by_channel(output[name])[:, :len(chunk)].T.copy())
        return {name: np.concatenate(values) for name, values in collected.items()}

    def _features(self, buffers: Buffers) -> dict[str, np.ndarray]:
        features = {"x": buffers.x, "mask": buffers.masks[self._shard.window], "write": buffers.write,
                    "keep": buffers.keep} | self._caches
        if self._shard.rope is not None:
            features |= {"cos": buffers.cos[self._shard.rope], "sin": buffers.sin[self._shard.rope]}
        return features
