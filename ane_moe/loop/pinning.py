"""Experts pinned for a prompt: those that it chose most while it was read are all that may be used
afterwards, until they are chosen anew. THIS CHANGES THE MODEL.

What Apple says of AFM 3 on devices: experts are selected for a prompt, and again from time to time,
since flash is too slow to change them with every token. E = experts, T = tokens of a call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.figures import PinFigures
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.wiring import GateRule


@dataclass(frozen=True)
class PinOptions:
    """So many `experts` of each layer are pinned, and chosen anew after `every` tokens (None:
    never)."""

    experts: int
    every: int | None = None


class Pinning:
    """Which experts of each layer may be used. A token's weights of others go to those of its own
    that are pinned, in proportion; where it has none of them, experts add nothing."""

    def __init__(self, experts: Mapping[int, int], pinned: int, figures: PinFigures) -> None:
        """`experts`: how many each layer has."""
        self._heard = {layer: np.zeros(count) for layer, count in experts.items()}
        self._allowed: dict[int, np.ndarray] = {}
        self._pinned = pinned
        self._figures = figures

    def hear(self, layer: int, gates: np.ndarray) -> np.ndarray:
        """Take note of what tokens choose, `gates [E,T]`, and leave it."""
        heard = self._heard[layer]
        heard += gates[: len(heard)].sum(axis=1, dtype=np.float64)
        return gates

    def restrict(self, layer: int, gates: np.ndarray) -> np.ndarray:
        """`gates [E,T]` with nothing but what is pinned, of the same sums."""
        self.hear(layer, gates)
        allowed = self._allowed[layer]
        kept = gates * allowed[:, None]
        self._figures.chosen += int((gates[: len(self._heard[layer])] != 0).sum())
        self._figures.kept += int((kept[: len(self._heard[layer])] != 0).sum())
        if (kept == gates).all():
            return gates
        before, after = (one.sum(axis=0, dtype=np.float32) for one in (gates, kept))
        share = np.divide(before, after, out=np.zeros_like(before), where=after > 0)
        return (kept * share).astype(gates.dtype)

    def select(self, rows: Mapping[int, int]) -> None:
        """Pin the experts with most weight since it was last asked; `rows`: E of each layer's
        gates, of which those after its experts stand for no expert and stay."""
        for layer, heard in self._heard.items():
            allowed = np.ones(rows[layer], bool)
            allowed[np.argsort(-heard, kind="stable")[self._pinned :]] = False
            self._allowed[layer] = allowed
            heard[:] = 0
        self._figures.selections += 1


class PinnedSession(Session):
    """A session that reads a prompt with all experts, and goes on with those that it pinned."""

    def __init__(self, shards: LoadedShards, options: PinOptions, *, concurrency: int = 1) -> None:
        """Raises UserError for senseless numbers, and a conversion whose experts are not called by
        the host."""
        if options.experts < 1 or (options.every is not None and options.every < 1):
            raise UserError("at least one expert is pinned, for one token", f"{options}")
        if not shards.experts:
            raise UserError(
                f"the host does not call the experts in {shards.folder}",
                f"{shards.manifest.routing} routing",
                "convert with --routing sparse",
            )
        experts = {
            layer: sum(len(group.experts) for group in table.groups)
            for layer, table in shards.experts.items()
        }
        counted = PinFigures(options.experts)
        self._pinning = Pinning(experts, options.experts, counted)
        self._options = options
        self._since = 0
        super().__init__(shards, concurrency=concurrency)
        self.figures.pinned = counted

    def decode(self, identifier: int) -> np.ndarray:
        if self._since == self._options.every:
            self._select()
        logits = super().decode(identifier)
        self._since += 1
        return logits

    def _prefilled(self, chunks: Iterable[np.ndarray], tokens: int) -> np.ndarray:
        logits = super()._prefilled(chunks, tokens)
        self._select()
        return logits

    def _select(self) -> None:
        slots = self._decode.slots
        self._pinning.select(
            {layer: len(slots.columns(f"gates.{layer}")) for layer in self.shards.experts}
        )
        self._since = 0

    def _gate_rule(self, name: str) -> GateRule:
        return self._pinning.restrict if name == "decode" else self._pinning.hear
