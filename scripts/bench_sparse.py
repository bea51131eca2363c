"""Expert packages: ours beside `coremltools.utils.save_multifunction` on the same experts.

    scripts/bench_sparse.py --scratch FOLDER [--functions 16,64,128] [--d-model 1024] [--width 512]

Each path runs in a process of its own, which reports its wall time (imports left out), its peak
resident memory and the bytes of the package it wrote: one function per expert, for one token.
`ours` goes from the experts' weights in files to the package, tracing the template included.
`coremltools` is the same way by its own means: each expert traced with its weights, converted and
saved, then all joined. `save_multifunction` is that last step alone, handed the packages of one
expert each.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MB = 1_000_000


def main() -> None:
    arguments = parse()
    if arguments.path:
        print(json.dumps(PATHS[arguments.path](arguments)))
        return
    counts = [int(count) for count in arguments.functions.split(",")]
    print(
        f"experts of {arguments.d_model} x {arguments.width}: "
        f"{6 * arguments.d_model * arguments.width / MB:.1f} MB each in fp16; {os.cpu_count()} "
        f"cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for count in counts:
        run("prepare", arguments, count)
        rows = {
            name: run(name, arguments, count)
            for name in ("ours", "save_multifunction", "coremltools")
        }
        ours = rows["ours"]
        for name, row in rows.items():
            print(
                f"{count:4} functions  {name:18} {row['seconds']:7.2f} s   peak "
                f"{row['peak_bytes'] / MB:7,.0f} MB "
                f"({row['above_imports_bytes'] / MB:7,.0f} MB above imports)   "
                f"{row['bytes'] / MB:7,.1f} MB, "
                f"{row['seconds'] / ours['seconds']:5.1f}x our time, "
                f"{row['peak_bytes'] / ours['peak_bytes']:.1f}x our memory "
                f"({row['above_imports_bytes'] / ours['above_imports_bytes']:.0f}x above imports)",
                flush=True,
            )
        shutil.rmtree(arguments.scratch / "experts")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--functions", default="16,64,128")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(path: str, arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--path",
        path,
        "--scratch",
        str(arguments.scratch),
        "--functions",
        str(count),
        "--d-model",
        str(arguments.d_model),
        "--width",
        str(arguments.width),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path} with {count} functions failed ({done.returncode}): {done.stderr[-500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def template(arguments: argparse.Namespace, function: str) -> Any:
    from ane_moe.emit.coreml.tracing import make_template
    from ane_moe.model.experts import ExpertGroupConfig
    from ane_moe.model.spec import MlpSpec
    from ane_moe.model.template_key import TemplateKey

    return make_template(
        TemplateKey(
            ExpertGroupConfig(arguments.d_model, MlpSpec(arguments.width)), ((function, 1),)
        )
    )


def values(arguments: argparse.Namespace, expert: int, names: list[str]) -> Any:
    import numpy as np

    for name in names:
        yield name, np.load(arguments.scratch / "experts" / f"{expert:03d}.{name}.npy")


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """The experts' weights in files of their own, and each expert as a package."""
    import numpy as np

    from ane_moe.emit.coreml.package import ContentKey, stamp

    folder = arguments.scratch / "experts"
    folder.mkdir(parents=True)
    one, rng = template(arguments, "main"), np.random.default_rng(0)
    for expert in range(int(arguments.functions)):
        for name, shape in one.weights.items():
            np.save(
                folder / f"{expert:03d}.{name}.npy",
                (rng.standard_normal(shape) / 32).astype(np.float16),
            )
        stamp(
            {"": one},
            values(arguments, expert, list(one.weights)),
            ContentKey(expert),
            folder / f"{expert:03d}.mlpackage",
        )
    return {}


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from ane_moe.emit.coreml.package import ContentKey, stamp

    imported, started = peak_bytes(), time.perf_counter()
    one = template(arguments, "t1")
    prefixes = [f"expert_{expert:03d}" for expert in range(int(arguments.functions))]
    weights = (
        (f"{prefix}/{name}", value)
        for expert, prefix in enumerate(prefixes)
        for name, value in values(arguments, expert, list(one.weights))
    )
    path = arguments.scratch / "ours.mlpackage"
    stamp(dict.fromkeys(prefixes, one), weights, ContentKey("bench"), path)
    return report(imported, started, path)


def save_multifunction(arguments: argparse.Namespace) -> dict[str, Any]:

    imported, started = peak_bytes(), time.perf_counter()
    return report(imported, started, joined(arguments, arguments.scratch / "experts"))


def coremltools(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from ane_moe.coreml_tools import ct
    from ane_moe.model.experts import ExpertGroupConfig
    from ane_moe.model.port import shapes_of
    from ane_moe.model.spec import MlpSpec
    from ane_moe.parts.unbound import build_unbound

    imported, started = peak_bytes(), time.perf_counter()
    parts = arguments.scratch / "parts"
    parts.mkdir()
    block = (
        build_unbound(ExpertGroupConfig(arguments.d_model, MlpSpec(arguments.width)))
        .to_empty(device="cpu")
        .eval()
    )
    shapes = shapes_of(block.ports(1).inputs)
    for expert in range(int(arguments.functions)):
        names = [name for name, _ in block.named_parameters()]
        block.load_state_dict(
            {
                name: torch.from_numpy(value).float()
                for name, value in values(arguments, expert, names)
            }
        )
        traced = torch.jit.trace(
            positional(block), tuple(torch.zeros(shape) for shape in shapes.values())
        )
        ct.convert(
            traced,
            inputs=[
                ct.TensorType(name=name, shape=shape, dtype=np.float16)
                for name, shape in shapes.items()
            ],
            outputs=[ct.TensorType(name="y", dtype=np.float16)],
            skip_model_load=True,
            minimum_deployment_target=ct.target.iOS18,
        ).save(str(parts / f"{expert:03d}.mlpackage"))
    row = report(imported, started, joined(arguments, parts))
    shutil.rmtree(parts)
    return row


def positional(block: Any) -> Any:
    """The tracer takes no keywords."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, ffn_input: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return self.block(ffn_input=ffn_input, gate=gate)["y"]

    return Called().eval()


def joined(arguments: argparse.Namespace, folder: Path) -> Path:
    from ane_moe.coreml_tools import ct

    path = arguments.scratch / "theirs.mlpackage"
    description = ct.utils.MultiFunctionDescriptor()
    for expert in range(int(arguments.functions)):
        description.add_function(
            str(folder / f"{expert:03d}.mlpackage"), "main", f"expert_{expert:03d}_t1"
        )
    description.default_function_name = "expert_000_t1"
    ct.utils.save_multifunction(description, str(path))
    return path


PATHS = {
    "prepare": prepare,
    "ours": ours,
    "save_multifunction": save_multifunction,
    "coremltools": coremltools,
}


def report(imported: int, started: float, package: Path) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    shutil.rmtree(package)
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "above_imports_bytes": peak_bytes() - imported,
        "bytes": size,
    }


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
