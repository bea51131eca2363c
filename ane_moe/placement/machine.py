"""Which chip and system this is."""

import subprocess
from dataclasses import dataclass

from ane_moe.placement.targets import SYSTEMS, Target, find_target, target_names

BRAND = ("sysctl", "-n", "machdep.cpu.brand_string")  # "Apple M4 Max"
VERSION = ("sw_vers", "-productVersion")  # "15.5"


@dataclass(frozen=True)
class Machine:
    """`chip` is a target's name where the rules know it, else what the system calls it, or
    "unknown"."""

    chip: str
    os: str


def this_machine() -> Machine:
    """Asks the system; what it does not tell is "unknown"."""
    brand = _ask(BRAND).removeprefix("Apple ").lower().replace(" ", "-")
    return Machine(brand or "unknown", _ask(VERSION) or "unknown")


def matching_target(machine: Machine, otherwise: Target) -> Target:
    """The target that the rules know for this machine; each of chip and system that they do not is
    `otherwise`'s."""
    chip = machine.chip if machine.chip in target_names() else otherwise.name
    major = machine.os.partition(".")[0]
    known = [system for system in SYSTEMS if major.isdigit() and system <= int(major)]
    return find_target(chip, max(known, default=otherwise.os))


def _ask(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
