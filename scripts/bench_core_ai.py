"""What `convert --format aimodel` costs, beside `cp` and beside the conversion for Core ML.

    scripts/bench_core_ai.py CHECKPOINT --scratch FOLDER [--rounds 3] [--formats fp16,int8]
        [--routing masked]

Each step runs as a process of its own with one worker and ends with a `sync`; steps alternate, and
the table of docs/coreai.md is of medians. The first round fills a template cache of the run's own
and is printed apart. Memory is the proportional set size of all processes of a step, sampled.
"""

import argparse
import os
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from command_cost import Cost, cost_of

MB, GB = 1_000_000, 1_000_000_000
COPY = "`cp -r` of the checkpoint"
PACKAGES = {"mlpackage": "Core ML", "aimodel": "Core AI"}


def main() -> None:
    arguments = parse()
    os.environ["ANE_MOE_CACHE"] = str(arguments.scratch / "cache")
    out = arguments.scratch / "out"
    steps = {COPY: ["cp", "-r", str(arguments.checkpoint), str(out)]}
    for form in arguments.formats:
        for package, name in PACKAGES.items():
            command = [sys.executable, "-m", "ane_moe", "convert", str(arguments.checkpoint)]
            options = ["--format", package, "--compress", form, "--workers", "1"]
            options += ["--routing", arguments.routing]
            steps[f"{form} for {name}"] = [*command, str(out), *options]
    costs: dict[str, list[Cost]] = defaultdict(list)
    written: dict[str, int] = {}
    for number in range(arguments.rounds + 1):
        for name, command in steps.items():
            cost = cost_of(command, sync=True)
            if cost.code:
                raise SystemExit(f"{command} failed: {cost.stderr[-500:]}")
            written[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            shutil.rmtree(out)
            costs[name].append(cost)
            print(f"round {number} {name}: {cost.seconds:.1f} s", file=sys.stderr)
    print(f"\n{arguments.checkpoint.name}, {arguments.routing}, {os.cpu_count()} cores")
    print(table(costs, written))


def table(costs: dict[str, list[Cost]], written: dict[str, int]) -> str:
    lines = [
        "| | GB written | s | of `cp` | CPU s | first time, CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    copied = statistics.median(cost.seconds for cost in costs[COPY][1:])
    for name, (first, *rest) in costs.items():
        seconds = statistics.median(cost.seconds for cost in rest)
        cpu = statistics.median(cost.cpu_seconds for cost in rest)
        peak = max(cost.peak_bytes for cost in (first, *rest)) / MB
        lines.append(
            f"| {name} | {written[name] / GB:.2f} | {seconds:.1f} | {seconds / copied:.2f} | "
            f"{cpu:.1f} | {first.cpu_seconds:.1f} | {peak:,.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, help="a checkpoint's size is free")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["fp16", "int8"])
    parser.add_argument("--routing", default="masked")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
