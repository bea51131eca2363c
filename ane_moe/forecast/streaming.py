"""Experts read from disk while others compute: a discrete-event simulation of what a token takes.

Predicted, never measured. `Timeline` is the machine; `simulate` plays a model on it of which only
rates are known, `routing/cache_study.py` a recorded trace.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ane_moe.loop.layer_times import LayerTimes

Read = tuple[int, float]  # the number of a function, and the ms that reading it takes


class Timeline:
    """A machine that computes, reads what is needed, and reads ahead meanwhile. All times in ms."""

    def __init__(
        self,
        readers: int = 1,
        ahead_readers: int = 1,
        channels: int | None = None,
        contention: float = 0.0,
    ) -> None:
        """Readers and `contention` are as in `LayerTimes`. The disk serves so many `channels` at
        once (None: as many as `readers`), what is needed before what is guessed."""
        self.now = self.stalled = 0.0
        self._readers = readers
        self._ahead_readers = ahead_readers
        self._channels = readers if channels is None else channels
        self._slow = 1 + contention
        self._queue: deque[Read] = deque()
        self._admit: Callable[[int], bool] = lambda function: True
        self._reading: dict[int, float] = {}  # ahead: when each will have been read

    @property
    def on_their_way(self) -> list[int]:
        """Functions that are being read ahead."""
        return list(self._reading)

    def load_ahead(self, reads: Iterable[Read], admit: Callable[[int], bool]) -> None:
        """Read ahead, first things first, what `admit` finds room for when its turn comes; replaces
        what an earlier call asked for and has not been begun."""
        self._queue, self._admit = deque(reads), admit

    def compute(self, ms: float) -> None:
        """Compute for so long, were nothing read meanwhile."""
        self._begin(0)
        while self._reading:
            until = min(self._reading.values())
            if (possible := (until - self.now) / self._slow) >= ms:
                self.now += ms * self._slow
                return
            ms -= possible
            self._go_to(until)
            self._begin(0)
        self.now += ms

    def need(self, missing: Iterable[Read], late: Iterable[int] = ()) -> float:
        """Wait until the `missing` have been read, and those that are being read ahead and are
        `late`; for how long."""
        waiting, awaited, started = deque(missing), set(late), self.now
        own: list[float] = []  # when each of those that are read will have been
        while waiting or own or awaited & self._reading.keys():
            while waiting and len(own) < self._readers and self._free(len(own)):
                own.append(self.now + waiting.popleft()[1])
            if not waiting or len(own) == self._readers:
                self._begin(len(own))
            self._go_to(min([*own, *self._reading.values()]))
            own = [end for end in own if end > self.now]
        self.stalled += self.now - started
        return self.now - started

    def _free(self, needed: int) -> bool:
        """Whether a channel is, beside so many that read what is needed."""
        return needed + len(self._reading) < self._channels

    def _go_to(self, time: float) -> None:
        self.now = time
        self._reading = {one: end for one, end in self._reading.items() if end > time}

    def _begin(self, needed: int) -> None:
        while self._queue and len(self._reading) < self._ahead_readers and self._free(needed):
            function, ms = self._queue.popleft()
            if function not in self._reading and self._admit(function):
                self._reading[function] = self.now + ms


@dataclass(frozen=True)
class Simulated:
    """Means over the tokens played. `all_right`: the share of layers all of whose experts had been
    guessed or were resident."""

    token_ms: float
    stalled_ms: float
    all_right: float


def simulate(
    times: LayerTimes,
    layers: int,
    *,
    accuracy: float | None = None,
    resident: float = 0.0,
    tokens: int = 20,
    seed: int = 0,
) -> Simulated:
    """A model of equal layers, each of whose k experts is resident with probability `resident`.

    accuracy: None reads on demand; else k experts of the next layer are guessed as soon as a layer
    knows its own, each rightly with that probability, and read while it computes.
    """
    random = np.random.default_rng(seed)
    line = Timeline(times.readers, times.ahead_readers, contention=times.contention)
    steps, k, all_right = layers * tokens, times.k, 0
    there, wrong_there = (random.random((steps, k)) < resident for _ in range(2))
    guessed = random.random((steps, k)) < (accuracy or 0.0)
    begun: set[int] = set()

    def begin(function: int) -> bool:
        begun.add(function)
        return True

    for step in range(steps):
        absent = (np.flatnonzero(~there[step]) + step * k).tolist()
        missing = [(function, times.read_ms) for function in absent if function not in begun]
        late = begun.intersection(absent, line.on_their_way)
        all_right += not missing
        begun.clear()
        if accuracy is not None and step + 1 < steps:
            own, following = (step + 1) * k, step + 1
            names = own + np.arange(k)
            # Wrong guesses read functions that nobody calls; they may be resident as well.
            named = np.where(guessed[following], names, -names)
            absent = ~np.where(guessed[following], there[following], wrong_there[following])
            line.load_ahead([(int(one), times.read_ms) for one in named[absent]], begin)
        line.need(missing, late)
        line.compute(times.compute_ms)
    return Simulated(line.now / tokens, line.stalled / tokens, all_right / steps)
