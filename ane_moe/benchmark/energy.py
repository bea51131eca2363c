"""Energy per token, as macOS's powermetrics estimates it.

powermetrics needs root: it is started through `sudo -n`, which never asks for a password. Field
names of its property lists and their units (energies in mJ a sample) are those that asitop
(github.com/tlkh/asitop) reads.
"""

import plistlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.parsers.expat import ExpatError

from ane_moe.benchmark.result import Energy, PowerReading
from ane_moe.errors import UserError
from ane_moe.files import temporary_folder

INTERVAL_MS = 500
IDLE_SAMPLES = 6
DECODE_SAMPLES = 20
COMMAND = (
    "sudo",
    "-n",
    "powermetrics",
    "--samplers",
    "cpu_power,gpu_power,ane_power,thermal",
    "-f",
    "plist",
)
LIMITS = (
    "estimates by powermetrics for the whole machine, CPU + GPU + Neural Engine, without DRAM "
    "and display; Apple "
    "says not to compare devices by them"
)


class NotPermitted(Exception):
    """powermetrics did not run, in its own words."""


def require_powermetrics(which: Callable[[str], str | None] = shutil.which) -> None:
    """Raise UserError where there is no powermetrics at all."""
    if which("powermetrics") is None:
        raise UserError(
            "energy is measured by macOS's powermetrics",
            "there is none on this machine",
            "leave out --energy",
        )


def measure_energy(decode_token: Callable[[], None]) -> Energy:
    """Power at rest, then while `decode_token` is called again and again. Raises NotPermitted."""
    with temporary_folder() as folder:
        samples = folder / "samples"
        meter = _start(samples, IDLE_SAMPLES)
        idle = _finish(meter, samples)
        meter, tokens, started = _start(samples, DECODE_SAMPLES), 0, perf_counter()
        try:
            while meter.poll() is None:
                decode_token()
                tokens += 1
        except BaseException:
            meter.kill()
            meter.communicate()
            raise
        seconds = perf_counter() - started
        decoding = _finish(meter, samples)
    each = seconds / max(tokens, 1)
    return Energy(
        idle,
        decoding,
        tokens,
        each * decoding.total_mw,
        each * (decoding.total_mw - idle.total_mw),
        LIMITS,
    )


def _start(samples: Path, count: int) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "-i", str(INTERVAL_MS), "-n", str(count), "-o", str(samples)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise NotPermitted(str(error)) from error


def _finish(meter: subprocess.Popen[bytes], samples: Path) -> PowerReading:
    _, errors = meter.communicate()
    if meter.returncode or not samples.is_file():
        words = " ".join(errors.decode(errors="replace").split())
        raise NotPermitted(words[-300:] or f"exit code {meter.returncode}")
    reading = mean_power(samples.read_bytes())
    samples.unlink()
    return reading


def mean_power(samples: bytes) -> PowerReading:
    """Of powermetrics' property lists, parted by NUL; the first sample, which saw it start, is left
    out of several.

    Raises NotPermitted when they hold no power figures (another version of powermetrics, or no
    Apple chip).
    """
    try:
        parsed = [plistlib.loads(piece) for piece in samples.split(b"\0") if piece.strip()]
        kept = parsed[1:] or parsed
        seconds = sum(sample["elapsed_ns"] for sample in kept) / 1e9
        cpu, gpu, ane = (
            _energy_mj(kept, f"{engine}_energy") / seconds for engine in ("cpu", "gpu", "ane")
        )
        pressure = [
            str(sample["thermal_pressure"]) for sample in kept if "thermal_pressure" in sample
        ]
    except (
        plistlib.InvalidFileException,
        ExpatError,
        KeyError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        raise NotPermitted(
            f"powermetrics reported no power of CPU, GPU and ANE: {error!r}"
        ) from None
    return PowerReading(cpu, gpu, ane, seconds, pressure[-1] if pressure else None)


def _energy_mj(samples: list[dict[str, Any]], name: str) -> float:
    return float(sum(sample["processor"][name] for sample in samples))
