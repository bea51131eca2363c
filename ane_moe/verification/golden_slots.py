"""What a golden says of the slots around a shard. N = tokens, C = channels of a slot."""

from dataclasses import dataclass

import numpy as np

from ane_moe.manifest import Shard
from ane_moe.model.port import STREAM, slot_arguments, slot_root
from ane_moe.original.golden import Golden, LayerGolden


@dataclass(frozen=True)
class GoldenSlots:
    """Values of slots before and after the call of a shard."""

    golden: Golden

    def before(self, shard: Shard, slot: str) -> np.ndarray:
        """What the shard is given, fp32 `[N,C]`."""
        if slot != STREAM:
            (name,) = slot_arguments(slot)
            return self._first(shard).carried_in[name]
        if shard.layer is None:
            return self.golden.layers[max(self.golden.layers)].y
        first = self._first(shard)
        return first.middle if shard.scope == "ffn" else first.x

    def expected(self, shard: Shard, slot: str) -> tuple[np.ndarray, np.ndarray] | None:
        """What the slot holds afterwards, fp32 `[N,C]`, as what it held before and the shard's own contribution; None
        for slots that say nothing by themselves."""
        root = slot_root(slot)
        if slot == STREAM:
            return self.before(shard, slot), self._added(shard)
        if root == "logits":
            logits = self.golden.logits[:, slice(*(shard.rows or (0, None)))]
            return np.zeros_like(logits), logits
        if root == "carry":
            (name,) = slot_arguments(slot)
            after = self._last(shard).carried_out[name]
            return np.zeros_like(after), after
        return None

    def _added(self, shard: Shard) -> np.ndarray:
        first, last = self._first(shard), self._last(shard)
        if shard.scope:
            return last.ffn_delta if shard.scope == "ffn" else first.attn_delta
        return last.y - first.x

    def _first(self, shard: Shard) -> LayerGolden:
        return self.golden.layers[shard.place(()).layers[0]]

    def _last(self, shard: Shard) -> LayerGolden:
        return self.golden.layers[shard.place(()).layers[-1]]
