"""Experts from a store, at budgets from all of them down to a tenth.

    scripts/bench_stream.py OUT [--tokens 24] [--shares 1,0.5,0.25,0.1] [--cold] [--expand]

OUT is a conversion with `--routing stream`. At each budget the same random tokens are decoded twice
over, by the product's own reading (`pread` into buffers that are used again) and by copying out of
a memory map, in turn; each in an empty cache of its own. Bytes a token are those read of the files.
Hits are of random weights and tokens, so they say what a share of all experts is worth where
choices are even; trained routers repeat themselves more. The page cache is the system's: where the
file fits into memory beside the rest, no read waits for a disk. With `--cold` the system is told to
forget the stores before every token, so that each expert that is missing comes off the disk, as of
a model that is larger than memory by far; what the process read from the disk is printed beside.

With `--expand` also: bytes a second of weights expanded to fp16, beside copying as many.
"""

import argparse
import mmap
import os
import time
from pathlib import Path

import numpy as np
import torch

from ane_moe.expert_record import Store
from ane_moe.loop import expert_store
from ane_moe.loop.expert_expansion import expand
from ane_moe.loop.expert_store import StoreFile
from ane_moe.loop.session import Session
from ane_moe.loop.shards import load_shards
from ane_moe.manifest import read_manifest

MB, GB = 1_000_000, 1_000_000_000
WARM = 40  # tokens: all but a few of 128 experts, 8 a token, have been chosen by then
ROUNDS = 7


OPEN: list["ReadFile"] = []


class ReadFile(StoreFile):
    """The product's own reading."""

    def __init__(self, path: Path, store: Store, content_key: str, direct: bool = False):
        super().__init__(path, store, content_key, direct)
        OPEN.append(self)

    def forget(self) -> None:
        """Leave nothing of it in the page cache."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class MappedFile(ReadFile):
    """The same file, read through a map."""

    def __init__(self, path: Path, store: Store, content_key: str, direct: bool = False):
        super().__init__(path, store, content_key, direct)
        self.map = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)

    def read(self, expert: int, into: np.ndarray) -> None:
        start = expert * len(into)
        into.data[:] = memoryview(self.map)[start : start + len(into)]
        self.bytes_read += len(into)

    def forget(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)  # pages that are mapped stay in the cache
        super().forget()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--shares",
        type=lambda text: [float(share) for share in text.split(",")],
        default=[1.0, 0.5, 0.25, 0.1],
    )
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--expand", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shards = [shard for shard in read_manifest(arguments.out).shards if shard.store]
    stores = [shard.store for shard in shards if shard.store]
    whole = sum(store.count * store.record.expanded.size for store in stores)
    stored = sum(store.count * store.record.size for store in stores)
    print(
        f"{sum(store.count for store in stores)} experts, {stored / GB:.2f} GB stored, "
        f"{whole / GB:.2f} GB in memory; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"reference runtime"
    )
    if arguments.expand:
        path = arguments.out / shards[0].path
        print_expansion(StoreFile(path, stores[0], shards[0].content_key))
    for share in arguments.shares:
        for name, kind in {"pread": ReadFile, "mmap": MappedFile}.items():
            given = share, whole, stored / whole, name, kind, arguments.tokens, arguments.cold
            print(measure(arguments.out, *given), flush=True)


def measure(
    out: Path,
    share: float,
    whole: int,
    stored_share: float,
    name: str,
    kind: type[ReadFile],
    tokens: int,
    cold: bool,
) -> str:
    """One line: a session over an empty cache that holds a `share` of the experts, which are
    `whole` bytes in memory and `stored_share` of that in the files."""
    OPEN.clear()
    ordinary, expert_store.StoreFile = expert_store.StoreFile, kind
    try:
        memory = 4 * whole / MB + 8000  # more than all takes: the cache's limit is what counts
        shards = load_shards(
            out, "reference", expert_cache_bytes=int(share * whole), memory_mb=memory
        )
    finally:
        expert_store.StoreFile = ordinary
    session = Session(shards)
    ids = np.random.default_rng(0).integers(0, shards.manifest.vocab, WARM + tokens).tolist()
    for token in ids[:WARM]:
        session.decode(token)
    cache, decode = session.figures.cache, session.figures.decode
    assert cache is not None
    before = cache.bytes_loaded, cache.hits, cache.hits + cache.misses, decode.load_seconds
    wall = cpu = 0.0
    from_disk = read_from_disk()
    for token in ids[WARM:]:
        for file in OPEN if cold else ():
            file.forget()
        started, begun = time.perf_counter(), time.process_time()
        session.decode(token)
        wall += time.perf_counter() - started
        cpu += time.process_time() - begun
    from_disk = read_from_disk() - from_disk
    calls = cache.hits + cache.misses - before[2]
    read = (cache.bytes_loaded - before[0]) * stored_share
    return (
        f"{share:5.0%} {name:6} {read / tokens / MB:8.1f} MB a token read, "
        f"{from_disk / tokens / MB:.1f} off the disk, "
        f"{(cache.hits - before[1]) / calls:6.1%} hits, "
        f"stall {1000 * (decode.load_seconds - before[3]) / tokens:7.1f} ms a token, "
        f"{tokens / wall:6.2f} tok/s ({1000 * cpu / tokens:.0f} CPU ms a token), "
        f"{decode.copies_per_token:.1f} host copies a token, most calls at once "
        f"{decode.most_at_once}"
    )


def read_from_disk() -> int:
    """Bytes that this process has caused to be fetched from storage; Linux counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def print_expansion(file: StoreFile) -> None:
    """Bytes a second of one expert expanded, beside copying what comes of it."""
    record, whole = file.store.record, file.store.record.expanded
    read = np.empty(record.size, np.uint8)
    file.read(0, read)
    buffer, other = (np.zeros(whole.size, np.uint8) for _ in range(2))
    weights = expert_store.views(whole, buffer)

    def expanding() -> None:
        for weight in record.weights:
            expand(weight, read, weights[weight.name])

    seconds = {}
    for name, work in {"expand": expanding, "memcpy": lambda: np.copyto(other, buffer)}.items():
        times = []
        for _ in range(ROUNDS):
            started = time.process_time()
            work()
            times.append(time.process_time() - started)
        seconds[name] = min(times)
    forms = "/".join(dict.fromkeys(weight.form for weight in record.weights))
    print(
        f"expanding {forms}: {whole.size / seconds['expand'] / GB:.2f} GB/s of fp16, copying "
        f"{whole.size / seconds['memcpy'] / GB:.2f} GB/s: "
        f"{seconds['expand'] / seconds['memcpy']:.1f} times as long"
    )


if __name__ == "__main__":
    main()
