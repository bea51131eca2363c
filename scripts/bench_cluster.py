"""Conversion by 1, 2 and 4 workers of a Dask cluster beside as many processes of `convert` itself,
and a model of larger clusters.

    scripts/bench_cluster.py CHECKPOINT --scratch FOLDER [--rounds 3] [--formats fp16,lut4]
    scripts/bench_cluster.py --model          # the modelled table alone, into docs/cluster.md

Workers have one thread each and are pinned, in turn, to the cores of this machine; so are the
processes of the local pool, to as many cores. Both alternate in one run, with a cache of templates
that is filled before. Wall time is of the command, until its data is on the disk; workers are there
before it begins, as on a cluster that has other work. CPU seconds are of all processes. The model
(cluster_model.toml) takes rates that were measured on one machine and network and disks by name:
nothing of it was measured.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from command_cost import cost_of
from doc_page import PagePart

from ane_moe.checkpoints.checkpoint import TensorSource
from ane_moe.conversion.plan import ConvertOptions, ShardPlan
from ane_moe.families import describe_config
from ane_moe.forecast.conversion_cost import CONVERSION_COST
from ane_moe.forecast.layer_kinds import KindsPlan, plan_kinds
from ane_moe.formats.recipe import find_recipe

MB = 1_000_000
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
TABLE = PagePart("cluster.md", "modelled")
MODEL = Path(__file__).with_name("cluster_model.toml")
COUNTS = (1, 8, 64, 256)  # workers that are modelled
FORMATS, ROUTINGS = ("int8", "lut4"), ("masked", "stream")
HEAD = """
| model, format, routing | shards | read, written | {counts} | 64 workers: what binds |
|---|---|---|{lines}|---|
"""


def main() -> None:
    arguments = parse()
    if arguments.model:
        TABLE.write(modelled_table())
        return
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    os.environ |= {"ANE_MOE_CACHE": str(arguments.scratch / "cache"), "OMP_NUM_THREADS": "1"}
    for form in arguments.formats:
        measure_format(form, arguments)


def measure_format(form: str, arguments: argparse.Namespace) -> None:
    """Print medians of the rounds for one weight format."""
    out = arguments.scratch / "out"
    own = ["convert", str(arguments.checkpoint), str(out), "--compress", form]
    command = [sys.executable, "-m", "ane_moe", *own, "--routing", arguments.routing]
    costs: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    timed(command, out, 1)  # traces, and fills the page cache
    for _ in range(arguments.rounds):
        for count in arguments.workers:
            local = [*command, "--workers", str(count)]
            costs["local", count].append(timed(local, out, count))
            with pinned_cluster(count, arguments.scratch) as (address, workers):
                before = cpu_seconds(workers)
                seconds, cpu = timed([*command, "--cluster", address], out, count)
                costs["cluster", count].append((seconds, cpu + cpu_seconds(workers) - before))
    print(
        f"\n{arguments.checkpoint.name}, {form}, {arguments.routing}: medians of "
        f"{arguments.rounds} rounds on {len(CORES)} cores, load {os.getloadavg()[0]:.1f}"
    )
    for count in arguments.workers:
        mine, theirs = (median(costs[kind, count]) for kind in ("local", "cluster"))
        print(
            f"  {count} workers  local {mine[0]:6.1f} s {mine[1]:6.1f} CPU s   cluster "
            f"{theirs[0]:6.1f} s {theirs[1]:6.1f} CPU s   {theirs[0] / mine[0]:.2f} x wall, "
            f"{theirs[1] / mine[1]:.2f} x CPU"
        )


def timed(command: Sequence[str], out: Path, cores: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, of a conversion into `out` on so many cores."""
    cost = cost_of([*pin(CORES[:cores]), *command], sync=True)
    if cost.code:
        raise SystemExit(f"{' '.join(command)}: {cost.stderr}")
    shutil.rmtree(out)
    return cost.seconds, cost.cpu_seconds


def pin(cores: Sequence[int]) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, cores))]


@contextmanager
def pinned_cluster(count: int, scratch: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """The address of a scheduler with `count` workers, and their processes."""
    from distributed import Client

    file = scratch / "scheduler.json"
    file.unlink(missing_ok=True)
    at = ["--scheduler-file", str(file), "--no-dashboard"]
    scheduler = ["distributed.cli.dask_scheduler", *at, "--host", "127.0.0.1", "--port", "0"]
    worker = ["distributed.cli.dask_worker", *at, "--nthreads", "1", "--no-nanny"]
    pinned = [([CORES[place % len(CORES)]], worker) for place in range(count)]
    with ExitStack() as stack:
        started = []
        for cores, module in [(CORES, scheduler), *pinned]:
            process = subprocess.Popen(
                [*pin(cores), sys.executable, "-m", *module], stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            started.append(psutil.Process(process.pid))
        while not file.exists():
            time.sleep(0.1)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(count, timeout=60)
            address = client.scheduler.address
        yield address, started


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def median(costs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    walls, cpus = zip(*costs, strict=True)
    return statistics.median(walls), statistics.median(cpus)


@dataclass(frozen=True)
class Work:
    """What a conversion reads, encodes and writes, in MB (1e6): altogether, and in its longest
    call."""

    shards: int
    graphs: int
    read_mb: float
    encoded_mb: float
    written_mb: float
    longest: tuple[float, float, float]  # read, encoded, written


def work_of(kinds: KindsPlan) -> Work:
    """Of a plan of one layer of each kind."""
    plan = kinds.plan
    table = 2e-6 * plan.spec.vocab * plan.spec.d_model
    sizes = [(table, 0.0, plan.embed_bytes / MB)]
    repeats = [1]
    for shard in plan.shards:
        sizes.append((*read_and_encoded(shard), shard.weight_bytes / MB))
        repeats.append(1 if shard.layer is None else kinds.repeats[shard.layer])
    read, encoded, written = (
        sum(size[column] * times for size, times in zip(sizes, repeats, strict=True))
        for column in range(3)
    )
    graphs = len({graph for shard in plan.shards for graph in shard.graphs.values()})
    return Work(sum(repeats) - 1, graphs, read, encoded, written, max(sizes))


def read_and_encoded(shard: ShardPlan) -> tuple[float, float]:
    """MB of a checkpoint in 16 bits, and of these in matrices that get another format."""
    read = encoded = 0.0
    for name, source in shard.sources.items():
        if isinstance(source, TensorSource):
            size = 2e-6 * source.region[1]
            read += size
            encoded += size if name in shard.choices else 0.0
    return read, encoded


def seconds_of(
    work: Work, form: str, workers: int, facts: dict[str, Any], rates: dict[str, Any]
) -> dict[str, float]:
    """What each thing that may bind would take alone, in seconds."""
    write, encode = (rates["write"]["expected"] / 2, rates["encode"][form]["expected"])
    nodes = -(-workers // facts["workers_by_node"])
    moved = work.read_mb + work.written_mb
    read, encoded, written = work.longest
    own = min(facts["node_mb_second"], facts["storage_mb_second"])
    return {
        "the workers": (work.read_mb / write + work.encoded_mb / encode) / workers,
        "the network": moved / (facts["node_mb_second"] * nodes),
        "the disk": moved / facts["storage_mb_second"],
        "the longest shard": read / write + encoded / encode + (read + written) / own,
    }


def modelled_table() -> str:
    tables, rates = tomllib.loads(MODEL.read_text()), tomllib.loads(CONVERSION_COST.read_text())
    counts = " | ".join(f"{count} worker{'s' * (count > 1)}" for count in COUNTS)
    rows = []
    for name, config in tables["model"].items():
        spec = describe_config(config)
        for form in FORMATS:
            for routing in ROUTINGS:
                options = ConvertOptions(routing=routing, recipe=find_recipe(form))
                work = work_of(plan_kinds(spec, options))
                rows.append(row(f"{name}, {form}, {routing}", work, form, tables["cluster"], rates))
    return HEAD.format(counts=counts, lines="|".join("---" for _ in COUNTS)) + "\n".join(rows)


def row(name: str, work: Work, form: str, facts: dict[str, Any], rates: dict[str, Any]) -> str:
    """Whatever takes longest hides the others; opening and tracing come before."""
    before = facts["start_seconds"] + work.graphs * rates["trace"]["expected"]
    alone = {count: seconds_of(work, form, count, facts, rates) for count in COUNTS}
    times = " | ".join(clock(before + max(each.values())) for each in alone.values())
    binding = sorted(alone[64].items(), key=lambda item: -item[1])
    said = ", ".join(f"{what} {clock(seconds)}" for what, seconds in binding)
    sizes = f"{work.read_mb / 1e3:,.0f}, {work.written_mb / 1e3:,.0f} GB"
    return f"| {name} | {work.shards} | {sizes} | {times} | {said} |"


def clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument(
        "--model", action="store_true", help="write the modelled table, run nothing"
    )
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["fp16", "lut4"])
    parser.add_argument("--routing", default="masked")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=lambda text: [*map(int, text.split(","))], default=[1, 2, 4]
    )
    arguments = parser.parse_args()
    if not arguments.model and not (arguments.checkpoint and arguments.scratch):
        parser.error("give a checkpoint and --scratch, or --model")
    return arguments


if __name__ == "__main__":
    main()
