"""What is installed on this machine, what the machine has, and what can be found out on it."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from ane_moe.fetched_folders import fetched_folders
from ane_moe.files import free_bytes
from ane_moe.placement.machine import Machine, this_machine
from ane_moe.user_cache import user_cache

NAME = "ane-moe"
DEVELOPMENT = "dev"  # an extra that is no user's
CORE_ML = "coremlpython"  # the library of coremltools that runs models, in wheels for macOS alone
LEAST_MACOS = 15  # packages with several functions and states

# What is found out by which command: on a Mac with Core ML, and anywhere else.
FINDINGS = (
    (
        "whether shards are right",
        "verify",
        "measured, through Core ML",
        "measured, through the reference runtime: the same numbers, slowly",
    ),
    (
        "where operations run",
        "verify --compute-plan",
        "measured by Core ML, of this chip",
        "predicted, by rules with their sources",
    ),
    (
        "speed, load, memory",
        "bench",
        "measured",
        "predicted (plan, report); bench times this CPU, and says so",
    ),
    ("energy", "bench --energy", "measured, as root", "predicted (plan)"),
    ("other chips and systems", "plan --target", "predicted", "predicted"),
)


@dataclass(frozen=True)
class Package:
    """A package that this one needs, or takes for an `extra`; versions as text, `found` None where
    it is not installed."""

    name: str
    wanted: str
    found: str | None
    fits: bool
    extra: str = ""


@dataclass(frozen=True)
class Disk:
    """A folder, what it is for, and what is free where it lies."""

    purpose: str
    folder: str
    free_bytes: int


@dataclass(frozen=True)
class Fetched:
    """How much is kept in a cache `folder` of what was fetched of addresses and of the Hub."""

    folder: str
    count: int
    size_bytes: int


@dataclass(frozen=True)
class Finding:
    """Something that a command finds out, and whether it measures or predicts it here."""

    what: str
    command: str
    how: str


@dataclass(frozen=True)
class Installation:
    """`native` are coremltools' compiled libraries; without `core_ml` packages are executed by the
    reference runtime. `usable_cores` are those that this process may run on."""

    version: str
    python: str
    system: str
    machine: Machine
    packages: tuple[Package, ...]
    native: tuple[str, ...]
    core_ml: bool
    cores: int
    usable_cores: int
    memory_bytes: int
    free_memory_bytes: int
    disks: tuple[Disk, ...]
    fetched: Fetched
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether all that is needed is there, in a version that was asked for."""
        return bool(self.native) and all(one.fits for one in self.packages if not one.extra)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"sound": self.sound} | asdict(self)


def installation() -> Installation:
    """Look at this machine; nothing is imported that takes seconds, nothing is changed."""
    machine, native = this_machine(), _native("coremltools")
    core_ml = any(CORE_ML in name for name in native) and _major(machine.os) >= LEAST_MACOS
    memory = psutil.virtual_memory()
    return Installation(
        version=version(NAME),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        machine=machine,
        packages=packages(requires(NAME) or ()),
        native=native,
        core_ml=core_ml,
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        disks=tuple(_disks()),
        fetched=_fetched(user_cache()),
        findings=tuple(
            Finding(what, command, here if core_ml else elsewhere)
            for what, command, here, elsewhere in FINDINGS
        ),
    )


def packages(required: Iterable[str]) -> tuple[Package, ...]:
    """What requirements ask for, as `importlib.metadata.requires` gives them, against what is
    installed: those of the package first, then those of its extras."""
    found = []
    for text in required:
        requirement = Requirement(text)
        extra = text.partition("extra ==")[2].strip(" '\"")
        if extra == DEVELOPMENT:
            continue
        there = _version(requirement.name)
        fits = there is not None and requirement.specifier.contains(there, prereleases=True)
        wanted = str(requirement.specifier)
        found.append(Package(requirement.name, wanted, there, fits, extra))
    return tuple(sorted(found, key=lambda one: (one.extra, one.name)))


def _native(package: str) -> tuple[str, ...]:
    """The compiled libraries in a package's folder; the package is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent
    return tuple(sorted(path.name.partition(".")[0] for path in folder.glob("lib*.so")))


def _disks() -> Iterable[Disk]:
    from huggingface_hub import constants

    places = {
        "this folder": Path.cwd(),
        "checkpoints of the Hub": Path(constants.HF_HUB_CACHE),
        "templates and compiled models": user_cache(),
    }
    for purpose, folder in places.items():
        yield Disk(purpose, str(folder), free_bytes(folder))


def _fetched(cache: Path) -> Fetched:
    kept = fetched_folders(cache)
    return Fetched(str(cache), len(kept), sum(one.size_bytes for one in kept))


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _major(system: str) -> int:
    major = system.partition(".")[0]
    return int(major) if major.isdigit() else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
