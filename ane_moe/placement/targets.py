"""The chips a placement is predicted for, and their limits (`targets.toml`)."""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ane_moe.errors import UserError

TARGETS = Path(__file__).with_name("targets.toml")
DEFAULT_TARGET = "m4-max"
DEFAULT_OS = 26
SYSTEMS = (15, 26, 27)  # macOS numbers; 15 stands for iOS 18 too


@dataclass(frozen=True)
class Target:
    """A chip and a system. `limits` are the generation's and the device's, in elements and
    bytes."""

    name: str
    generation: str
    number: int
    device: str
    os: int
    limits: dict[str, int]


def find_target(name: str = DEFAULT_TARGET, os: int = DEFAULT_OS) -> Target:
    """The target called `name`. Raises UserError for a chip or a system that no rule speaks of."""
    tables = _tables()
    if name not in tables["targets"]:
        raise UserError("no such target", name, f"choose one of: {', '.join(tables['targets'])}")
    if os not in SYSTEMS:
        raise UserError("no such system", str(os), f"choose one of: {', '.join(map(str, SYSTEMS))}")
    chip = tables["targets"][name]
    limits = dict(tables["generations"][chip["generation"]])
    number = limits.pop("number")
    return Target(
        name,
        chip["generation"],
        number,
        chip["device"],
        os,
        limits | tables["devices"][chip["device"]],
    )


def target_names() -> tuple[str, ...]:
    """Every chip by name."""
    return tuple(_tables()["targets"])


@functools.cache
def _tables() -> dict:
    return tomllib.loads(TARGETS.read_text())
