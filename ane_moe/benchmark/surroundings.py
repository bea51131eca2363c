"""What a run is measured under: chip, system, versions, power and heat, as far as the machine
tells."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ane_moe.benchmark.result import Conditions
from ane_moe.forecast.workload import workload_of
from ane_moe.loop.figures import conditions as runtime_label
from ane_moe.manifest import Manifest
from ane_moe.placement.machine import this_machine
from ane_moe.runtime.coreai.installed import DISTRIBUTIONS

PACKAGES = ("ane-moe", "coremltools", "numpy", "torch")
EXECUTING = {"coreai": DISTRIBUTIONS}  # what a runtime is beside them
BATTERY = ("pmset", "-g", "batt")  # "Now drawing from 'AC Power'"
SETTINGS = ("pmset", "-g")  # " lowpowermode         0"
THERMAL = ("pmset", "-g", "therm")  # notes, or "CPU_Speed_Limit = 100"
CPU_INFO = Path("/proc/cpuinfo")
POWER_SUPPLIES = Path("/sys/class/power_supply")


def surroundings(
    manifest: Manifest,
    runtime: str,
    units: str | None,
    warmup: int,
    compiled_before: tuple[int, int] | None,
) -> Conditions:
    """The conditions of a run that begins now."""
    machine = this_machine()
    return Conditions(
        label=runtime_label(runtime),
        chip=machine.chip if machine.chip != "unknown" else _processor(),
        os=f"macOS {machine.os}" if machine.os != "unknown" else platform.platform(terse=True),
        units=units,
        cores=os.cpu_count() or 1,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        power_source=power_source(),
        low_power_mode=low_power_mode(),
        thermal=thermal_state(),
        versions={"python": platform.python_version()}
        | {name: _version(name) for name in (*PACKAGES, *EXECUTING.get(runtime, ()))},
        weights=manifest.weights,
        routing=manifest.routing,
        context=manifest.context,
        prefill_tokens=manifest.prefill,
        tail_share=workload_of(manifest).tail_share,
        warmup=warmup,
        compiled_before=compiled_before,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def power_source() -> str | None:
    """ "AC Power" or "Battery Power" (macOS's words); None where it cannot be read."""
    if found := re.search(r"drawing from '([^']+)'", _ask(BATTERY)):
        return found[1]
    mains = [
        _read(supply / "online")
        for supply in sorted(POWER_SUPPLIES.glob("*"))
        if _read(supply / "type") == "Mains"
    ]
    return ("AC Power" if "1" in mains else "Battery Power") if mains else None


def low_power_mode() -> bool | None:
    found = re.search(r"^\s*lowpowermode\s+(\d)", _ask(SETTINGS), re.MULTILINE)
    return found[1] != "0" if found else None


def thermal_state() -> str | None:
    """What macOS says of thermal limits, on one line."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in _ask(THERMAL).splitlines()]
    return "; ".join(filter(None, lines)) or None


def _processor() -> str:
    """The processor's name on Linux, else the architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(CPU_INFO), re.MULTILINE)
    return found[1].strip() if found else platform.machine() or "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _ask(command: tuple[str, ...]) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
