"""Conversion with compressed weights, beside `cp` of the checkpoint and mlx-lm's 4-bit conversion
of it.

    scripts/bench_compress.py CHECKPOINT --scratch FOLDER [--formats int8 lut4] [--rounds 2]
    [--without-mlx]

mlx-lm and mlx's CPU build are installed into an environment of their own below --scratch. Every
step is a process of its own, followed by `sync`; times are wall times, memory is the largest
resident memory of a process and its children.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from bench_convert import MB, measure

MLX = ("mlx[cpu]", "mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["int8", "lut4"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without-mlx", action="store_true")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint, out = arguments.checkpoint, arguments.scratch / "out"
    steps = {"cp": ["cp", "-r", str(checkpoint), str(out)]}
    for name in arguments.formats:
        steps[f"ane-moe {name}"] = [
            sys.executable,
            "-m",
            "ane_moe",
            "convert",
            str(checkpoint),
            str(out),
            "--compress",
            name,
            "--workers",
            str(arguments.workers),
        ]
    python = None if arguments.without_mlx else mlx_environment(arguments.scratch / "mlx")
    if python:
        steps["mlx-lm 4 bit"] = [
            str(python),
            "-m",
            "mlx_lm",
            "convert",
            "--hf-path",
            str(checkpoint),
            "--mlx-path",
            str(out),
            "-q",
            "--q-bits",
            "4",
        ]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for _ in range(arguments.rounds):
        for name, command in steps.items():
            took, peak = measure(command)
            seconds[name].append(took)
            peaks[name] = max(peaks[name], peak)
            shutil.rmtree(out)
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) / MB
    print(
        f"checkpoint {size:,.0f} MB, {os.cpu_count()} cores, {arguments.workers} workers, "
        f"{arguments.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f} at the end"
    )
    for name, took in seconds.items():
        print(
            f"{name:16} median {statistics.median(took):6.1f} s  (all "
            f"{[round(one, 1) for one in took]})  "
            f"peak memory {peaks[name] / MB:,.0f} MB"
        )


def mlx_environment(folder: Path) -> Path | None:
    """The Python of an environment with mlx-lm; None, with the reason printed, where it cannot be
    made."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *MLX], capture_output=True, text=True
    )
    if installed.returncode:
        print(f"mlx-lm left out: {installed.stderr.strip().splitlines()[-1]}")
        return None
    return python


if __name__ == "__main__":
    main()
