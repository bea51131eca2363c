"""Which loaded expert functions leave first, when another needs their room.

Functions are numbered. A policy is told which layer begins and what it calls, and ranks them all:
those of the lowest rank leave first. What the running layer still needs is not its business: who
makes room keeps that as long as anything else can go. F = functions.
"""

from collections.abc import Callable, Sequence

import numpy as np

STEP = 1 << 40  # between ranks that differ in more than the time of the last use


class LeastRecent:
    """The function that was used longest ago leaves first."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers`: that of each function."""
        _, self._place = np.unique(layers, return_inverse=True)
        self._layers = {layer: place for layer, place in zip(layers, self._place, strict=True)}
        self._last = np.zeros(len(layers), np.int64)  # when it was used, or loaded ahead
        self._clock = 0
        self._at = -1  # the place of the running layer
        self._pass = 0

    def begin(self, layer: int) -> None:
        """`layer` runs, for the next token where layers begin anew."""
        place = int(self._layers[layer])
        self._pass += place <= self._at
        self._at = place

    def entered(self, function: int) -> None:
        """It has been loaded, or is being."""
        self._clock += 1
        self._last[function] = self._clock

    def called(self, function: int) -> None:
        self.entered(function)

    def ranks(self) -> np.ndarray:
        """Int64 `[F]`."""
        return self._last


class LeastFrequent(LeastRecent):
    """The one that was called least often, of all calls so far, leaves first."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        self._calls = np.zeros(len(layers), np.int64)

    def called(self, function: int) -> None:
        super().called(function)
        self._calls[function] += 1

    def ranks(self) -> np.ndarray:
        return self._calls * STEP + self._last


class LayerDistance(LeastRecent):
    """That of the layer whose turn comes last leaves first: layers run in order, so those just run
    have longest to wait."""

    def ranks(self) -> np.ndarray:
        layers = len(self._layers)
        ahead = (self._place - self._at - 1) % layers  # layers that run before it
        return (layers - ahead) * STEP + self._last


class LeastStale(LeastRecent):
    """Stale functions, which this pass over the layers left uncalled as it went by, leave first;
    then those that it called; those of layers still to come last. After SpecMD (arXiv 2602.03921),
    of which the abstract was read."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        self._used_in = np.full(len(layers), -1, np.int64)  # the pass of its last use

    def called(self, function: int) -> None:
        super().called(function)
        self._used_in[function] = self._pass

    def ranks(self) -> np.ndarray:
        to_come = self._place > self._at
        in_this_pass = self._used_in == self._pass
        return np.where(to_come, 2, in_this_pass) * STEP + self._last


class Belady(LeastRecent):
    """The one that is needed again last leaves first (Belady 1966): of functions of one size no
    policy misses less often. It has to know all calls to come."""

    def __init__(self, layers: Sequence[int], calls: Sequence[int]) -> None:
        super().__init__(layers)
        self._never = len(calls)
        self._next = np.full(len(layers), self._never, np.int64)
        self._following = np.empty(len(calls), np.int64)  # when what is called then is so again
        for time in range(len(calls) - 1, -1, -1):
            self._following[time] = self._next[calls[time]]
            self._next[calls[time]] = time
        self._time = 0

    def called(self, function: int) -> None:
        self._next[function] = self._following[self._time]
        self._time += 1

    def ranks(self) -> np.ndarray:
        return -self._next


# name -> a policy that needs to know nothing of what is to come
POLICIES: dict[str, Callable[[Sequence[int]], LeastRecent]] = {
    "lru": LeastRecent,
    "lfu": LeastFrequent,
    "layer-distance": LayerDistance,
    "least-stale": LeastStale,
}
# Of caches that hold less than a pass over the layers lru keeps nothing; docs/streaming.md has the
# hits of each on traces.
DEFAULT_POLICY = "layer-distance"
