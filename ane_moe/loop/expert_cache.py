"""Loaded expert functions, kept up to a byte limit; shared by all sessions."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter

from ane_moe.errors import UserError
from ane_moe.loop.eviction import POLICIES
from ane_moe.loop.figures import CacheFigures, CallClock
from ane_moe.runtime.interface import LoadedFunction


@dataclass(frozen=True)
class FunctionKey:
    """One function of one package; `path` is relative to the conversion's folder."""

    path: str
    name: str


@dataclass
class _Entry:
    size: int
    ahead: bool  # loaded ahead and not called yet
    asked: bool = False  # its call is about to come, and was counted as a miss
    function: LoadedFunction | None = None  # None while it is loading
    users: int = 0


class Eviction:
    """A policy of `loop/eviction.py` over functions by their keys."""

    def __init__(self, layers: Mapping[FunctionKey, int], policy: str) -> None:
        """`layers`: of every function there is. Raises UserError for an unknown policy."""
        if policy not in POLICIES:
            raise UserError(
                "there is no such expert policy", repr(policy), f"choose from {', '.join(POLICIES)}"
            )
        self._numbers = {key: number for number, key in enumerate(layers)}
        self._policy = POLICIES[policy](list(layers.values()))

    def begin(self, layer: int) -> None:
        """`layer` runs."""
        self._policy.begin(layer)

    def entered(self, key: FunctionKey) -> None:
        """It is being loaded."""
        self._policy.entered(self._numbers[key])

    def called(self, key: FunctionKey) -> None:
        """It is in use."""
        self._policy.called(self._numbers[key])

    def order(self, keys: Iterable[FunctionKey]) -> list[FunctionKey]:
        """Those that are to leave first come first."""
        ranks = self._policy.ranks()
        return sorted(keys, key=lambda key: ranks[self._numbers[key]])


class ExpertCache:
    """`load` makes a function ready to run, `size` gives the bytes its weights take; both may raise
    UserError. `eviction` says which leave first (None: the least recently used).

    A limit of None keeps everything. A function in use is never dropped, so a caller that holds one
    function at a time needs room for one; whoever finds no room waits until another thread lets go.
    """

    def __init__(
        self,
        load: Callable[[FunctionKey], LoadedFunction],
        size: Callable[[FunctionKey], int],
        limit_bytes: int | None = None,
        eviction: Eviction | None = None,
        *,
        release: Callable[[FunctionKey, LoadedFunction], None] = lambda key, function: None,
        readers: int = 0,
    ) -> None:
        """`release` is told of what is dropped. With `readers`, so many threads load what is about
        to be called."""
        self.figures = CacheFigures()
        self.limit_bytes = limit_bytes
        self._load = load
        self._size = size
        self._eviction = eviction
        self._release = release
        self._readers = ThreadPoolExecutor(readers, "expert-reader") if readers else None
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # an entry is ready, free or gone
        self._asked = threading.Condition(lock)  # there is something to load ahead
        self._entries: OrderedDict[FunctionKey, _Entry] = OrderedDict()
        self._protected: frozenset[FunctionKey] = frozenset()  # not to be dropped for loads ahead
        self._needed: Counter[FunctionKey] = Counter()  # by layers that run
        self._ahead: list[FunctionKey] = []
        self._worker: threading.Thread | None = None

    @contextmanager
    def hold(self, key: FunctionKey, clock: CallClock | None = None) -> Iterator[LoadedFunction]:
        """The function, loaded, and safe from being dropped while the context lasts.

        `clock` is told how long that took. Raises UserError when it cannot be loaded or is larger
        than the limit.
        """
        entry = self._ready(key) or self._wait_for(key, clock)
        try:
            assert entry.function is not None
            yield entry.function
        finally:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

    @contextmanager
    def running(self, layer: int, keys: Collection[FunctionKey]) -> Iterator[None]:
        """While the context lasts, `layer` calls `keys`: none of them is dropped where another
        function can be."""
        with self._changed:
            if self._eviction:
                self._eviction.begin(layer)
            self._needed.update(keys)
        try:
            yield
        finally:
            with self._changed:
                self._needed -= Counter(keys)

    def request(self, keys: Sequence[FunctionKey]) -> None:
        """Begin to load those of `keys` that are missing, side by side and as far as there is room
        beside the others: the caller is about to hold each of them. They count as misses."""
        if self._readers is None:
            return
        wanted, begun = frozenset(keys), []
        with self._changed:
            for key in keys:
                if key in self._entries:
                    continue
                size = self._size(key)
                if not self._make_room(size, wanted):
                    break
                self.figures.misses += 1
                begun.append((key, self._enter(key, size, ahead=False, asked=True)))
        for key, entry in begun:
            self._readers.submit(self._fill_quietly, key, entry)

    def load_ahead(self, keys: Sequence[FunctionKey], needed: Collection[FunctionKey] = ()) -> None:
        """Load `keys` in the background, first things first, dropping neither them nor those in
        `needed` for it.

        Replaces what an earlier call asked for and has not been begun.
        """
        with self._changed:
            self._protected = frozenset(keys).union(needed)
            self._ahead = [key for key in keys if key not in self._entries]
            if self._ahead and self._worker is None:
                self._worker = threading.Thread(
                    target=self._work, name="expert-loader", daemon=True
                )
                self._worker.start()
            if self._ahead:
                self._asked.notify()
            self._changed.notify_all()

    def resident_bytes(self, key: FunctionKey) -> int:
        """What `key` takes of the limit once loaded. Raises UserError when there is no such
        function."""
        return self._size(key)

    def resident(self, keys: Collection[FunctionKey]) -> float:
        """The share of `keys` that are loaded, or being loaded."""
        with self._changed:
            return sum(key in self._entries for key in keys) / max(1, len(keys))

    def settle(self) -> None:
        """Wait until nothing is being loaded ahead."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._ahead and all(e.function for e in self._entries.values())
            )

    def _ready(self, key: FunctionKey) -> _Entry | None:
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or entry.function is None:
                return None
            self.figures.hits += not entry.asked
            return self._use(key, entry)

    def _wait_for(self, key: FunctionKey, clock: CallClock | None) -> _Entry:
        started = perf_counter()
        if clock:
            clock.start_load()
        try:
            return self._fetch(key)
        finally:
            if clock:
                clock.stop_load()
            with self._changed:
                self.figures.wait_seconds += perf_counter() - started

    def _fetch(self, key: FunctionKey) -> _Entry:
        """The entry of `key`, loaded here unless another thread is at it."""
        size = self._size(key)
        if self.limit_bytes is not None and size > self.limit_bytes:
            raise UserError(
                "the expert cache is smaller than one expert function",
                f"{self.limit_bytes / 1e6:.2f} MB for {key.name} of {key.path}, {size / 1e6:.2f} "
                f"MB",
                "raise --expert-cache-mb",
            )
        with self._changed:
            counted = False
            while True:
                entry = self._entries.get(key)
                if entry is None and self._make_room(size, frozenset()):
                    break
                if entry is not None and entry.function is not None:
                    self.figures.hits += not counted  # loaded ahead since it was looked for
                    return self._use(key, entry)
                if entry is not None and not counted:
                    self.figures.late += not entry.asked
                    counted = True
                self._changed.wait()
            self.figures.misses += not counted
            entry = self._enter(key, size, ahead=False, users=1)
        self._fill(key, entry)
        return entry

    def _use(self, key: FunctionKey, entry: _Entry) -> _Entry:
        self._called(key)
        if entry.ahead:
            entry.ahead = False
            self.figures.bytes_unused -= entry.size
        entry.asked = False
        entry.users += 1
        return entry

    def _called(self, key: FunctionKey) -> None:
        self._entries.move_to_end(key)
        if self._eviction:
            self._eviction.called(key)

    def _enter(
        self, key: FunctionKey, size: int, ahead: bool, asked: bool = False, users: int = 0
    ) -> _Entry:
        """Count the bytes before loading them, so that threads together stay inside the limit."""
        entry = self._entries[key] = _Entry(size, ahead, asked, users=users)
        if self._eviction:
            self._eviction.entered(key)
        if not ahead:
            self._called(key)
        figures = self.figures
        figures.bytes_loaded += size
        figures.bytes_unused += size if ahead else 0
        figures.bytes_resident += size
        figures.bytes_peak = max(figures.bytes_peak, figures.bytes_resident)
        return entry

    def _fill(self, key: FunctionKey, entry: _Entry) -> None:
        started = perf_counter()
        try:
            function = self._load(key)
        except BaseException:
            with self._changed:
                self._drop(key)
                self._changed.notify_all()
            raise
        with self._changed:
            self.figures.loads += 1
            self.figures.load_seconds += perf_counter() - started
            entry.function = function
            self._changed.notify_all()

    def _make_room(self, size: int, protected: frozenset[FunctionKey]) -> bool:
        """Drop functions until `size` more bytes fit, those that a running layer needs last; drop
        none when that is impossible."""
        if self.limit_bytes is None:
            return True
        excess = self.figures.bytes_resident + size - self.limit_bytes
        if excess <= 0:
            return True
        leaving = []
        for key in self._droppable(protected):
            leaving.append(key)
            excess -= self._entries[key].size
            if excess <= 0:
                break
        if excess > 0:
            return False
        for key in leaving:
            self._drop(key)
            self.figures.evictions += 1
        return True

    def _droppable(self, protected: frozenset[FunctionKey]) -> list[FunctionKey]:
        free = [
            key
            for key, entry in self._entries.items()
            if entry.function is not None and entry.users == 0 and key not in protected
        ]
        order = self._eviction.order(free) if self._eviction else free
        return sorted(order, key=lambda key: self._needed[key] > 0)

    def _drop(self, key: FunctionKey) -> None:
        entry = self._entries.pop(key)
        self.figures.bytes_resident -= entry.size
        if entry.function is not None:
            self._release(key, entry.function)

    def _fill_quietly(self, key: FunctionKey, entry: _Entry) -> None:
        """A failure is left to the call that needs the function: it loads again and raises."""
        with suppress(UserError):
            self._fill(key, entry)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._asked.wait_for(lambda: self._ahead)
                key = self._ahead[0]
            self._load_one_ahead(key)

    def _load_one_ahead(self, key: FunctionKey) -> None:
        try:
            size = self._size(key)
        except UserError:
            size = None
        with self._changed:
            entry = None
            wanted = key in self._ahead  # else another request has replaced this one meanwhile
            if wanted:
                self._ahead.remove(key)
            if (
                wanted
                and size is not None
                and key not in self._entries
                and self._make_room(size, self._protected)
            ):
                entry = self._enter(key, size, ahead=True)
            self._changed.notify_all()
        if entry is not None:
            self._fill_quietly(key, entry)
