"""Host-side fp16 buffers of a token loop: made once, filled in place before every call.

T = tokens in a call, S = cache width, d = d_model, r = rotated channels of a head.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ane_moe.loop.embedding_table import EmbeddingTable
from ane_moe.manifest import Manifest

HIDDEN = np.float16(-1e4)       # additive mask of a slot that may not be seen; exp of it is 0 in fp16 and fp32


def rope_rows(manifest: Manifest, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of one rotary table for every position: two fp16 arrays `[context, r/2]`."""
    table = manifest.ropes[name]
    angles = np.arange(manifest.context, dtype=np.float64)[:, None] * np.asarray(table["inv_freq"], dtype=np.float64)
    factor = float(table["attention_factor"])
    return (factor * np.cos(angles)).astype(np.float16), (factor * np.sin(angles)).astype(np.float16)


def by_channel(array: np.ndarray) -> np.ndarray:
    """View `[1,C,1,T]` (bc1s) or `[1,C,T,1]` (bct1) as `[C,T]`; both hold the same bytes in the same order."""
    return array.reshape(array.shape[1], -1)


class Buffers:
    """The inputs every shard call of T tokens reads; `place` moves them to a position.

    x is in the manifest's layout; the others are as the attention functions declare them. One mask per distinct
    attention window, one (cos, sin) pair per rotary table.
    """

    def __init__(self, manifest: Manifest, tokens: int, embed: EmbeddingTable, windows: Iterable[int | None],
                 ropes: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        width, d = manifest.cache_width, manifest.d_model
        self.tokens = tokens
        self.x = np.zeros(activation_shape(manifest, d, tokens), np.float16)
        self.columns = by_channel(self.x)                                           # [d,T], the same memory
        self.total = np.zeros((d, tokens), np.float32)                              # sums of split layers
        self.masks = {window: np.zeros((1, 1, tokens, width), np.float16) for window in set(windows)}
        self.write = np.zeros((1, 1, tokens, width), np.float16)
        self.keep = np.zeros((1, 1, 1, width), np.float16)
        self.cos = {name: _rope_buffer(cos, tokens) for name, (cos, _) in ropes.items()}
        self.sin = {name: _rope_buffer(sin, tokens) for name, (_, sin) in ropes.items()}
        self._embed = embed
        self._ropes = ropes

    def place(self, ids: Sequence[int], position: int) -> None:
        """Set every input for `ids` (at most T of them) at `position` and the slots after it; the rest is padding."""
        count, last = len(ids), position + len(ids)
        self.write.fill(0)
        self.keep.fill(1)
        self.keep[..., position:last] = 0
        for token, identifier in enumerate(ids):
            self.columns[:, token] = self._embed[identifier]
            self.write[0, 0, token, position + token] = 1
        self.columns[:, count:] = 0
        for window, mask in self.masks.items():
            _fill_mask(mask[0, 0], count, position, window)
        for name, (cos, sin) in self._ropes.items():
            self.cos[name][0, 0, :, :count] = cos[position:last].T
            self.sin[name][0, 0, :, :count] = sin[position:last].T


def activation_shape(manifest: Manifest, channels: int, tokens: int) -> tuple[int, int, int, int]:
    """Shape of x, y, gates and logits in the manifest's layout."""
    return (1, channels, tokens, 1) if manifest.layout == "bct1" else (1, channels, 1, tokens)


def _rope_buffer(rows: np.ndarray, tokens: int) -> np.ndarray:
    return np.zeros((1, 1, rows.shape[1], tokens), np.float16)


def _fill_mask(mask: np.ndarray, count: int, position: int, window: int | None) -> None:
    """Open to each of `count` tokens itself and what precedes it inside the window; padding rows see slot 0."""
    mask.fill(HIDDEN)
    mask[count:, 0] = 0
    for token in range(count):
        end = position + token + 1
        mask[token, 0 if window is None else max(0, end - window):end] = 0
