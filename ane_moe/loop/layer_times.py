"""What a layer takes whose experts are read from disk: in closed form, for deciding whether to load
ahead. `forecast/streaming.py` plays the same through, event by event.

k = experts that a token calls in a layer.
"""

from dataclasses import dataclass
from math import ceil, comb


@dataclass(frozen=True)
class LayerTimes:
    """One layer: `compute_ms` without any waiting, `read_ms` of one expert. So many `readers` read
    at once what is needed now, `ahead_readers` what is guessed; none slows another, but computing
    takes 1 + `contention` as long while something is read ahead."""

    compute_ms: float
    read_ms: float
    k: int
    readers: int = 1
    ahead_readers: int = 1
    contention: float = 0.0

    def on_demand_ms(self, resident: float = 0.0) -> float:
        """Expected, where each expert is in memory with probability `resident`."""
        return self.compute_ms + self._rounds(1 - resident, self.readers) * self.read_ms

    def ahead_ms(self, accuracy: float, resident: float = 0.0) -> float:
        """Expected, where k experts are guessed while the layer before computes, each rightly with
        probability `accuracy`."""
        rounds = self._rounds(1 - resident, self.ahead_readers)
        slowed = self.slowed_ms(rounds * self.read_ms)
        # What is not begun when the layer begins is dropped, and read on demand if it is needed.
        begun = min(rounds, ceil(slowed / self.read_ms)) if rounds * self.read_ms else 0.0
        guessed = accuracy * (begun / rounds if rounds else 1.0)
        missed = self._rounds((1 - resident) * (1 - guessed), self.readers) * self.read_ms
        # What is being read then is waited for, or in the way of others where no reader is free.
        late = max(0.0, begun * self.read_ms - slowed)
        return slowed + (max(late, missed) if self.readers > self.ahead_readers else late + missed)

    def slowed_ms(self, reading_ms: float) -> float:
        """Computing, beside so much reading ahead."""
        slow = 1 + self.contention
        return min(slow * self.compute_ms, self.compute_ms + reading_ms * self.contention / slow)

    def pays(self, accuracy: float, resident: float = 0.0) -> bool:
        """Whether loading ahead is expected to take less time than loading what is missing."""
        return self.ahead_ms(accuracy, resident) < self.on_demand_ms(resident)

    def _rounds(self, missing: float, readers: int) -> float:
        """Expected reads that follow one another, where each of k experts is missing with that
        probability."""
        return sum(
            comb(self.k, n) * missing**n * (1 - missing) ** (self.k - n) * ceil(n / readers)
            for n in range(self.k + 1)
        )


def bound(compute_ms: float, read_ms: float) -> float:
    """How many times faster perfect guesses can make a layer: what is longer hides the other."""
    return (compute_ms + read_ms) / max(compute_ms, read_ms)
