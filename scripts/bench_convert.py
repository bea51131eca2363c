"""Conversion speed and memory, beside `cp` of the same checkpoint and beside other converters.

    scripts/bench_convert.py CHECKPOINT [LARGER] --scratch FOLDER [--rounds 5] [--formats fp16,lut4]

With a second checkpoint, of the same model with more layers, also what every further GB takes. Each
step runs as a process of its own and ends with a `sync`; steps alternate, so that all see the same
disk and the same neighbours, and medians of the rounds are printed beside the targets. Wall time is
what a user waits for; CPU seconds, of all processes of a step, depend less on neighbours. Memory is
the proportional set size of all processes, sampled: pages that they share count once.

Templates come from a cache of the run's own, empty for the first conversion, which is printed
apart. mlx-lm's 4-bit conversion is timed where mlx-lm is installed. The plain path is what a
conversion would otherwise cost: torch.jit.trace with real weights, ct.convert and save, for one
part of one MoE layer of the checkpoint.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from command_cost import Cost, cost_of

MB = 1_000_000
GB = 1_000_000_000
COPY, COLD, MLX = "cp -r", "fp16, no template kept", "mlx-lm, 4 bits"
# Of medians, at two layers on an idle machine: what may be at most, and beside what.
RATIOS = {"fp16": (1.5, COPY), "int8": (0.5, MLX), "lut4": (1.0, MLX)}
MOST_SECONDS_PER_GB = 1.5  # of a further GB of checkpoint, as fp16
MOST_PEAK_MB = 700  # two workers


def main() -> None:
    arguments = parse()
    os.environ["ANE_MOE_CACHE"] = str(arguments.scratch / "cache")
    costs: dict[tuple[Path, str], list[Cost]] = defaultdict(list)
    for number in range(arguments.rounds):
        for checkpoint in arguments.checkpoints:
            steps = {COPY: ["cp", "-r", str(checkpoint), str(arguments.scratch / "out")]}
            if not number and checkpoint == arguments.checkpoints[0]:
                steps[COLD] = ours(checkpoint, arguments, "fp16")
            steps |= {form: ours(checkpoint, arguments, form) for form in arguments.formats}
            if importlib.util.find_spec("mlx_lm"):
                steps[MLX] = mlx_lm(checkpoint, arguments.scratch / "out")
            for name, command in steps.items():
                costs[checkpoint, name].append(measure(command))
                shutil.rmtree(arguments.scratch / "out")
    print(
        f"{os.cpu_count()} cores, {arguments.workers} workers, {arguments.routing} routing, "
        f"medians of {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f} at the end"
    )
    for checkpoint in arguments.checkpoints:
        print_costs(
            checkpoint, {name: of for (path, name), of in costs.items() if path == checkpoint}
        )
    if len(arguments.checkpoints) > 1:
        print_slopes(arguments.checkpoints, costs)
    if not importlib.util.find_spec("mlx_lm"):
        print("mlx-lm is not installed: nothing of it is here to compare with")
    if arguments.plain:
        print_plain(arguments.checkpoints[0], arguments.scratch)


def ours(checkpoint: Path, arguments: argparse.Namespace, form: str) -> list[str]:
    command = [sys.executable, "-m", "ane_moe", "convert", str(checkpoint)]
    options = ["--workers", str(arguments.workers), "--routing", arguments.routing]
    return [*command, str(arguments.scratch / "out"), "--compress", form, *options]


def mlx_lm(checkpoint: Path, out: Path) -> list[str]:
    paths = ["--hf-path", str(checkpoint), "--mlx-path", str(out)]
    return [sys.executable, "-m", "mlx_lm", "convert", *paths, "-q", "--q-bits", "4"]


def print_costs(checkpoint: Path, costs: dict[str, list[Cost]]) -> None:
    size = size_of(checkpoint)
    print(f"\n{checkpoint.name}, {size / GB:.2f} GB")
    for name, each in costs.items():
        seconds = seconds_of(each)
        most, beside = RATIOS.get(name, (0.0, ""))
        ratio = f"{seconds / seconds_of(costs[COPY]):5.2f} x cp"
        if beside == COPY:
            ratio += f" (target {most})"
        elif beside in costs:
            ratio += f", {seconds / seconds_of(costs[beside]):.2f} x {beside} (target {most})"
        print(
            f"  {name:24} {seconds:6.1f} s  {median('cpu_seconds', each):6.1f} CPU s, "
            f"{median('cpu_seconds', each) / (size / GB):4.1f} a GB  {ratio}  peak "
            f"{max(cost.peak_bytes for cost in each) / MB:,.0f} MB (target {MOST_PEAK_MB})"
            f"  all {', '.join(f'{cost.seconds:.1f}' for cost in each)}"
        )


def print_slopes(checkpoints: Sequence[Path], costs: dict[tuple[Path, str], list[Cost]]) -> None:
    first, last = checkpoints[0], checkpoints[-1]
    more = (size_of(last) - size_of(first)) / GB
    print(f"\nevery further GB, from {first.name} to {last.name}")
    for name in [name for path, name in costs if path == last]:
        of_last, of_first = costs[last, name], costs[first, name]
        seconds = (seconds_of(of_last) - seconds_of(of_first)) / more
        cpu = (median("cpu_seconds", of_last) - median("cpu_seconds", of_first)) / more
        target = f" (target {MOST_SECONDS_PER_GB})" if name == "fp16" else ""
        print(f"  {name:24} {seconds:6.2f} s{target}  {cpu:6.2f} CPU s")


def print_plain(checkpoint: Path, scratch: Path) -> None:
    cost = measure([sys.executable, __file__, str(checkpoint), "--plain-path", str(scratch)])
    weights_mb = json.loads((scratch / "plain.json").read_text())["weight_bytes"] / MB
    shutil.rmtree(scratch / "plain.mlpackage")
    print(
        f"\nplain coremltools  {weights_mb:,.0f} MB of weights in {cost.seconds:.1f} s: "
        f"{weights_mb / cost.seconds:.0f} MB/s, peak {cost.peak_bytes / MB:,.0f} MB"
    )


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def median(field: str, costs: Sequence[Cost]) -> float:
    return statistics.median(getattr(cost, field) for cost in costs)


def seconds_of(costs: Sequence[Cost]) -> float:
    return median("seconds", costs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+", help="one, or a smaller and a larger")
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure; a checkpoint's size is free"
    )
    parser.add_argument(
        "--formats", type=lambda text: text.split(","), default=["fp16", "int8", "lut4"]
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--routing", default="masked")
    parser.add_argument("--plain", action="store_true", help="time the plain path too")
    parser.add_argument("--plain-path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_path:
        plain_path(arguments.checkpoints[0], arguments.plain_path)
        sys.exit()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    return arguments


def measure(command: list[str]) -> Cost:
    """What a command costs until its data is on the disk; one that fails ends the measurement."""
    cost = cost_of(command, sync=True)
    if cost.code:
        raise SystemExit(f"{command} failed: {cost.stderr[-500:]}")
    return cost


def plain_path(checkpoint: Path, scratch: Path) -> None:
    """Trace and convert one MoE part with its weights inside, as coremltools is ordinarily used."""
    import numpy as np
    import torch

    from ane_moe.checkpoints.checkpoint import TensorSource, open_checkpoint
    from ane_moe.conversion.pipeline import plan
    from ane_moe.conversion.plan import ConvertOptions
    from ane_moe.coreml_tools import ct
    from ane_moe.model.port import shapes_of
    from ane_moe.parts.unbound import build_unbound

    shard = next(
        shard for shard in plan(checkpoint, ConvertOptions()).shards if shard.kind == "moe"
    )
    opened = open_checkpoint(checkpoint)
    block = build_unbound(shard.graphs[""].block).to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        source = shard.sources[name]
        if isinstance(source, TensorSource):
            parameter.data = torch.from_numpy(opened.read(source)).float().reshape(parameter.shape)
        else:
            parameter.data = (
                torch.eye(source.rows, source.columns)
                .roll(source.first, 1)
                .reshape(parameter.shape)
            )

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x=x)["y"]

    with torch.no_grad():
        traced = torch.jit.trace(
            Positional().eval(), torch.zeros(shapes_of(block.ports(1).inputs)["x"])
        )
    half = np.float16
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name="x", shape=shapes_of(block.ports(1).inputs)["x"], dtype=half)],
        outputs=[ct.TensorType(name="y", dtype=half)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(scratch / "plain.mlpackage"))
    (scratch / "plain.json").write_text(json.dumps({"weight_bytes": shard.weight_bytes}))


if __name__ == "__main__":
    main()
