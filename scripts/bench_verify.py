"""Time and memory of proving a conversion of a published geometry, beside Hugging Face's own
forward pass over the same prompts.

    scripts/bench_verify.py --like qwen3-30b-a3b --layers 2 8 --scratch FOLDER

For each number of layers a random checkpoint is made, converted, and proved with `verify
--checkpoint`, in whole and `--quick`. Each step is a process of its own: wall and CPU seconds and
the peak of resident memory are the operating system's figures for it. Beside them is the whole
model in fp32 by `from_pretrained`, which is what the original's logits cost without a proof, and
where it does not fit into memory is left out. The targets are printed beside what was measured;
times are of this machine, and of what else runs on it.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import psutil
from command_cost import Cost, cost_of

GB = 1_000_000_000
TARGET_SECONDS, TARGET_BYTES = 90, 4 * GB  # of `verify --checkpoint`, 2 layers of qwen3-30b-a3b
CHILDREN = ("verify", "forward")


def main() -> None:
    arguments = parse()
    rows = {layers: bench(arguments, layers) for layers in arguments.layers}
    print(
        f"{arguments.like}, {arguments.compress} weights, {os.cpu_count()} cores, "
        f"load of the machine at the end {os.getloadavg()[0]:.1f} (1 minute)"
    )
    for layers, costs in rows.items():
        for step, cost in costs.items():
            print(
                f"{layers:3d} layers  {step:30s} {cost.seconds:7.1f} s   "
                f"{cost.cpu_seconds:7.1f} CPU s   peak {cost.peak_bytes / GB:5.2f} GB"
            )
    print(f"target of verify --checkpoint: {TARGET_SECONDS} s, {TARGET_BYTES / GB:.0f} GB")
    if len(rows) > 1:
        first, last = min(rows), max(rows)
        cpu = [rows[layers]["verify --checkpoint"].cpu_seconds for layers in (first, last)]
        print(
            f"{last} layers take {cpu[1] / cpu[0]:.2f} x the CPU time of {first}; "
            f"in proportion to layers alone it would be {last / first:.2f}"
        )


def bench(arguments: argparse.Namespace, layers: int) -> dict[str, Cost]:
    """Every step for one number of layers."""
    scratch = arguments.scratch / f"{arguments.like}-{layers}"
    checkpoint, out = scratch / "checkpoint", scratch / "out"
    if not checkpoint.is_dir():
        maker = str(Path(__file__).with_name("make_checkpoint.py"))
        measure(
            [maker, "--like", arguments.like, "--layers", str(layers), "--out", str(checkpoint)]
        )
    convert = ["convert", str(checkpoint), str(out), "--compress", arguments.compress]
    costs = {"convert": measure(["-m", "ane_moe", *convert, "--overwrite"])}
    own = [__file__, "--child", "verify", str(out), str(checkpoint)]
    costs["verify --checkpoint"] = measure(own)
    for label, seconds in json.loads((out.parent / "phases.json").read_text()).items():
        print(f"{layers:3d} layers    {label:40s} {seconds:7.1f} s", file=sys.stderr)
    costs["verify --checkpoint --quick"] = measure([*own, "--quick"])
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if 2 * weights < psutil.virtual_memory().available * 0.8:
        costs["Hugging Face, fp32, whole model"] = measure(
            [__file__, "--child", "forward", str(out), str(checkpoint)]
        )
    if not arguments.keep:
        shutil.rmtree(scratch)
    return costs


def measure(arguments: list[str]) -> Cost:
    """Run Python with `arguments`; a step that fails ends the measurement."""
    cost = cost_of([sys.executable, *arguments])
    if cost.code:
        sys.exit(f"{' '.join(arguments[:4])} failed: {cost.stderr[-500:]}")
    return cost


def run_verify(out: Path, checkpoint: Path, quick: bool) -> None:
    """Prove, and write how long each thing took."""
    from ane_moe.verification.verify import verify

    phases: dict[str, float] = {}
    label, since = "reading", time.monotonic()

    def progress(what: str, _done: int, _total: int) -> None:
        nonlocal label, since
        now = time.monotonic()
        phases[label] = phases.get(label, 0.0) + now - since
        label, since = "checking files" if what.startswith("checking") else what, now

    report = verify(out, checkpoint=checkpoint, quick=quick, progress=progress)
    progress("", 1, 1)
    (out.parent / "phases.json").write_text(json.dumps(phases))
    if not report.passed:
        sys.exit("a gate failed")


def run_forward(out: Path, checkpoint: Path) -> None:
    """The whole model in fp32 over the prompts that `verify` takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from ane_moe.manifest import read_manifest
    from ane_moe.original.prompts import builtin_prompts

    manifest = read_manifest(out)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        for ids in builtin_prompts(checkpoint, manifest.vocab, manifest.context):
            model(torch.tensor([ids]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", default="qwen3-30b-a3b", help="a preset of make_checkpoint.py")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--compress", default="int8")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and conversions")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "verify":
        out, checkpoint = arguments.paths
        run_verify(out, checkpoint, arguments.quick)
        sys.exit()
    if arguments.child == "forward":
        run_forward(*arguments.paths)
        sys.exit()
    if arguments.scratch is None:
        parser.error("--scratch is needed")
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
