"""Whether to load experts ahead: only where the model of time, fed with what was seen so far, says
that it pays."""

from time import perf_counter

from ane_moe.loop.figures import CacheFigures
from ane_moe.loop.layer_times import LayerTimes

# Measured by Flash-MoE: its GPU took so much longer while experts were read in the background. Of
# the Neural Engine it is not known.
CONTENTION = 0.73
WARM = 32  # layers that are loaded for in any case, to learn from
WEIGHT = 1 / 32  # of what is seen last


class AheadRule:
    """Watches layers run: what they take without waiting, what reading an expert takes, how often
    guesses are right."""

    def __init__(
        self, cache: CacheFigures, readers: int = 1, contention: float = CONTENTION
    ) -> None:
        """`readers`: loads at once of what is needed now."""
        self._cache = cache
        self._readers = readers
        self._contention = contention
        self._seen = 0
        self._accuracy = self._compute_ms = 0.0
        self._since: tuple[float, float] | None = None  # times of the clock, and waited in all

    def layer_starts(self, right: int, guessed: int) -> None:
        """A layer begins, of whose `guessed` experts so many were right."""
        now, waited = perf_counter(), self._cache.wait_seconds
        if self._since:
            passed = now - self._since[0] - (waited - self._since[1])
            self._compute_ms = self._mean(self._compute_ms, 1000 * max(0.0, passed))
            self._accuracy = self._mean(self._accuracy, right / guessed if guessed else 0.0)
            self._seen += 1
        self._since = (now, waited)

    def times(self, k: int) -> LayerTimes:
        """What has been seen, for k experts."""
        read_ms = 1000 * self._cache.load_seconds / max(1, self._cache.loads)
        return LayerTimes(self._compute_ms, read_ms, k, self._readers, 1, self._contention)

    def pays(self, k: int, resident: float) -> bool:
        """Whether to load k guessed experts, of which the share `resident` is in memory."""
        return self._seen < WARM or self.times(k).pays(self._accuracy, resident)

    def _mean(self, before: float, now: float) -> float:
        weight = max(WEIGHT, 1 / (self._seen + 1))
        return before + weight * (now - before)
