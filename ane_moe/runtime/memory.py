"""How much memory expanded weights may take."""

import threading
import weakref

import psutil

FREE_SHARE = 0.5  # of the memory that is free: what expanded weights take where nobody says
PATIENCE = 4  # products before a matrix is kept expanded where not all of them can be


class Memory:
    """A budget for weights that are kept expanded: whoever comes first, for as long as there is
    room. What is not kept is expanded again in each product, with the same result.

    Where all matrices fit they are kept from their first product on. Else only those that are used
    again and again, so that experts few tokens choose do not take the room of what every token
    passes through.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = max(0, limit_bytes)
        self.kept_bytes = 0
        self.wanted_bytes = 0  # of all matrices there are, once expanded
        self._lock = threading.RLock()  # an owner may be collected in the midst of it

    @property
    def patience(self) -> int:
        """Products of a matrix before it is worth keeping."""
        return 1 if self.wanted_bytes <= self.limit_bytes else PATIENCE

    def expect(self, owner: object, nbytes: int) -> None:
        """Count what `owner` would like to keep, for as long as it lives."""
        with self._lock:
            self.wanted_bytes += nbytes
        self._at_end(owner, 0, nbytes)

    def take(self, owner: object, nbytes: int) -> bool:
        """Whether `owner` may keep so much, from now on and for as long as it lives."""
        with self._lock:
            if self.kept_bytes + nbytes > self.limit_bytes:
                return False
            self.kept_bytes += nbytes
        self._at_end(owner, nbytes, 0)
        return True

    def _at_end(self, owner: object, kept: int, wanted: int) -> None:
        weakref.finalize(owner, self._release, kept, wanted).atexit = False

    def _release(self, kept: int, wanted: int) -> None:
        with self._lock:
            self.kept_bytes -= kept
            self.wanted_bytes -= wanted


def weight_memory(memory_mb: float | None, stored_bytes: int) -> Memory:
    """The budget where all weights, as stored and expanded, may take `memory_mb` (10^6 bytes; None:
    half of what is free for what is expanded)."""
    if memory_mb is None:
        return Memory(int(psutil.virtual_memory().available * FREE_SHARE))
    return Memory(int(memory_mb * 1_000_000) - stored_bytes)
