"""Conversion speed and memory, beside `cp` of the same checkpoint and beside the plain coremltools
path.

    scripts/bench_convert.py CHECKPOINT --scratch FOLDER [--workers 2] [--rounds 3] [--routing
    sparse]

Each step runs as a process of its own; the wall time and the peak resident memory are the operating
system's figures for that process and its children. `cp` and the conversion alternate, so that both
see the same disk and the same neighbours; each ends with a `sync`. The plain path is what a
conversion would otherwise cost: torch.jit.trace with real weights, ct.convert and save, for one
part of one MoE layer of the checkpoint.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

MB = 1_000_000


def main() -> None:
    arguments = parse()
    checkpoint, scratch = arguments.checkpoint, arguments.scratch
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) / MB
    copies, ours, peaks = [], [], []
    for _ in range(arguments.rounds):
        copies.append(measure(["cp", "-r", str(checkpoint), str(scratch / "copy")])[0])
        shutil.rmtree(scratch / "copy")
        command = [
            sys.executable,
            "-m",
            "ane_moe",
            "convert",
            str(checkpoint),
            str(scratch / "out"),
        ]
        seconds, peak = measure(
            [*command, "--workers", str(arguments.workers), "--routing", arguments.routing]
        )
        ours.append(seconds)
        peaks.append(peak)
        shutil.rmtree(scratch / "out")
    plain_seconds, plain_peak = measure(
        [sys.executable, __file__, str(checkpoint), "--plain-path", str(scratch)]
    )
    plain_mb = json.loads((scratch / "plain.json").read_text())["weight_bytes"] / MB
    shutil.rmtree(scratch / "plain.mlpackage")
    print(f"checkpoint {size:,.0f} MB, {os.cpu_count()} cores, {arguments.rounds} rounds")
    print(f"load of the machine at the end {os.getloadavg()[0]:.1f} (1 minute)")
    print(f"cp                 median {statistics.median(copies):6.1f} s   (all {rounded(copies)})")
    print(
        f"ane-moe convert    median {statistics.median(ours):6.1f} s   (all {rounded(ours)})   "
        f"peak memory {max(peaks) / MB:,.0f} MB   {arguments.workers} workers, "
        f"{arguments.routing} routing"
    )
    ratios = [mine / copy for mine, copy in zip(ours, copies, strict=True)]
    print(
        f"ratio to cp        median {statistics.median(ratios):6.2f}     (all {rounded(ratios, 2)})"
    )
    print(
        f"plain coremltools  {plain_mb:,.0f} MB of weights in {plain_seconds:.1f} s: "
        f"{plain_mb / plain_seconds:.0f} MB/s, peak memory {plain_peak / MB:,.0f} MB"
    )
    print(
        f"ours               {size / statistics.median(ours):,.0f} MB/s of checkpoint, everything "
        f"included"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure; the checkpoint's size twice"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routing", default="masked")
    parser.add_argument("--plain-path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_path:
        plain_path(arguments.checkpoint, arguments.plain_path)
        sys.exit()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    return arguments


def rounded(values: list[float], digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds until the data is on the disk, and peak resident bytes of the process tree.

    Without the sync a copy may take anything between the speed of memory and that of the disk,
    depending on what others have written. Memory is the proportional set size: pages that processes
    share count once.
    """
    subprocess.run(["sync"], check=True)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    subprocess.run(["sync"], check=True)
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        sys.exit(f"{command[0]} failed: {errors.decode()[-500:]}")
    return seconds, peak


def tree_bytes(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(one.memory_full_info().pss for one in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


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
