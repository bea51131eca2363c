"""Which machines a conversion fits into: the memory they are sold with (`memory_sizes.toml`)."""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.placement.targets import Target

SIZES = Path(__file__).with_name("memory_sizes.toml")
GIB = 1 << 30


@dataclass(frozen=True)
class Fit:
    """Whether a model of so many bytes fits into a machine with the chip: `fits` None where nobody
    says how much memory it is sold with. `least_gb`: the smallest such machine that holds it."""

    needed_bytes: int
    sizes_gb: tuple[int, ...]
    least_gb: int | None

    @property
    def fits(self) -> bool | None:
        return self.least_gb is not None if self.sizes_gb else None


def fit(needed_bytes: float, target: Target) -> Fit:
    """How `needed_bytes` of a loaded model go with the machines that have the chip."""
    tables = _tables()
    sizes = tuple(tables["memory_gb"].get(target.name, ()))
    share = tables["share"][target.device]
    enough = [size for size in sizes if needed_bytes <= share * size * GIB]
    return Fit(round(needed_bytes), sizes, min(enough, default=None))


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(SIZES.read_text())
