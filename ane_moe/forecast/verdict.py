"""The answer to `ane-moe plan` in one sentence: does it fit, how fast would it be, which way to
take."""

from dataclasses import asdict, dataclass
from typing import Any

from ane_moe.forecast.chips import Range
from ane_moe.forecast.memory_sizes import Fit

GB, MB = 1e9, 1e6
IN_WORDS = {"masked": "all experts computed", "sparse": "one function per expert"}


@dataclass(frozen=True)
class Verdict:
    """The way that was chosen of those that fit (the smallest, where none does). `on_engine`: no
    placement rule takes a large part of it off the engine. Speed and memory are predicted."""

    target: str
    routing: str
    recipe: str
    tok_s: Range
    bound: str
    memory: Fit
    on_engine: bool

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return f"{self._fits}; {self._speed}; {self._way}."

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"fits": self.memory.fits, "sentence": self.sentence}

    @property
    def _fits(self) -> str:
        sizes, size = self.memory.sizes_gb, f"{_size(self.memory.needed_bytes)} of memory"
        sold = " to ".join(map(str, sorted({min(sizes), max(sizes)}))) if sizes else ""
        if not sizes:
            return f"Needs up to {size}"
        if self.memory.least_gb is None:
            return f"Does not fit {self.target}: up to {size} at the least, sold with {sold} GB"
        if self.memory.least_gb == min(sizes):
            return f"Fits {self.target}, any that is sold: up to {size}"
        return f"Fits {self.target} with {self.memory.least_gb} GB or more: up to {size}"

    @property
    def _speed(self) -> str:
        speed = self.tok_s
        ends = f"{short(speed.low)} to {short(speed.high)}"
        return f"about {short(speed.expected)} tok/s ({ends}, predicted, bound by {self.bound})"

    @property
    def _way(self) -> str:
        words = f" ({IN_WORDS[self.routing]})" if self.routing in IN_WORDS else ""
        way = f"--routing {self.routing}{words} --compress {self.recipe}"
        if self.memory.fits is False:
            return f"the smallest way is {way}"
        if self.on_engine:
            return f"take {way}"
        return f"part of every way would leave the engine; the fastest is {way}"


def _size(count: int) -> str:
    return f"{short(count / GB)} GB" if count >= GB else f"{short(count / MB)} MB"


def short(value: float) -> str:
    """Two digits, or as many as its whole part has."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
