"""Where a sequence of tokens may be cut back to, so that another one goes on from what they have in
common: by the ports of what keeps states, whatever made them.

A cache with a slot for each position can be cut anywhere: masks hide what lies behind. A ring has
written over what lies more than its slots back. The states of recurrences and convolutions hold all
tokens as one, and cannot be cut at all.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ane_moe.manifest import Manifest, Shard
from ane_moe.model.port import MASK, Port, chunk_size, prompt_window, slot_arguments

ONE_WAY = ("shift", "real")  # roots of slots of mixers whose states cannot be taken back
RING = "ring_"


@dataclass(frozen=True)
class Ring:
    """A cache of `slots`, begun anew at its end, of which a token sees the last `window`."""

    slots: int
    window: int

    def allows(self, tokens: int, furthest: int) -> bool:
        """Whether what token number `tokens` sees is still there, where `furthest` were written."""
        return furthest <= self.slots or tokens >= furthest - self.slots + self.window - 1


@dataclass(frozen=True)
class Cuts:
    """`anywhere`: no state forbids it. `of_prompts`: tokens that were generated have seen less than
    a prompt's, so that only a prompt's are those of another prompt."""

    anywhere: bool
    rings: frozenset[Ring]
    of_prompts: bool

    def place(self, tokens: int, furthest: int, prompt: int | None) -> int:
        """The first `tokens` tokens or fewer, where a cut is possible; 0 where it is not. The
        caches have held `furthest` at most, the first `prompt` of the sequence as a prompt."""
        if self.of_prompts and prompt is not None:
            tokens = min(tokens, prompt)
        possible = self.anywhere and all(ring.allows(tokens, furthest) for ring in self.rings)
        return tokens if possible else 0


def cuts_of(manifest: Manifest) -> Cuts:
    """Where a session with these shards may be cut."""
    masks = {
        port.slot
        for shard in manifest.shards
        for port in shard.functions[0].ports.inputs
        if port.root == MASK
    }
    keeping = [shard for shard in manifest.shards if shard.states]
    return Cuts(
        all(_has_positions(shard, manifest.prefill > 0) for shard in keeping),
        frozenset(ring for ring in map(_ring, sorted(masks)) if ring),
        any(prompt_window(slot_arguments(slot)[0]) is not None for slot in masks),
    )


def _has_positions(shard: Shard, prefills: bool) -> bool:
    """Whether all that a shard keeps has a cache slot for each token. Recurrences take no notice of
    padding in calls of several tokens alone: without such calls a stack may hide one."""
    inputs = [port for function in shard.functions for port in function.ports.inputs]
    roots = {port.root for port in inputs}
    if "write" not in roots or roots & set(ONE_WAY) or (shard.layers and not prefills):
        return False
    widths = _widths(inputs)
    return all(shape[-1] in widths for shape in shard.states.values())


def _widths(inputs: Iterable[Port]) -> set[int]:
    """Slots of the caches that are written."""
    return {port.shape[-1] for port in inputs if port.root == "write"}


def _ring(slot: str) -> Ring | None:
    """The ring behind `mask.17.ring_64`."""
    window, *of = slot_arguments(slot)
    if not of:
        return None
    seen = chunk_size(window) or prompt_window(window) or int(window)
    return Ring(int(of[0].removeprefix(RING)), seen)
