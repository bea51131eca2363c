"""Experts that lie in stores: read when they are chosen, expanded to the numbers that graphs take,
and computed by the one graph that is there for all that are alike.

The page cache is left to the system, which knows better than we do what else wants memory; `direct`
goes around it. A record is checked against its CRC-32 when it is first used, and again where the
file has changed since.
"""

import errno
import mmap
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.expert_record import Record, Store, read_end
from ane_moe.loop.expert_cache import FunctionKey
from ane_moe.loop.expert_source import check_function
from ane_moe.manifest import Manifest, Shard
from ane_moe.model.port import FFN_INPUT, WEIGHT, Shape
from ane_moe.runtime import open_package
from ane_moe.runtime.interface import LoadedFunction

READERS = 4  # threads that read side by side: as many as a token's experts often are
Weights = dict[str, np.ndarray]


class Buffers:
    """Memory for records, aligned to pages and used again: pages that the system has to clear cost
    as much as the reading."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """uint8 `[size]`, holding what the last one left. Free ones of other sizes go back to the
        system."""
        with self._lock:
            if free := self._free.get(size):
                return free.pop()
            self._free.clear()
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Take back what `take` gave."""
        with self._lock:
            self._free.setdefault(buffer.nbytes, []).append(buffer)

    @contextmanager
    def lent(self, size: int) -> Iterator[np.ndarray]:
        """A buffer for the length of the block."""
        buffer = self.take(size)
        try:
            yield buffer
        finally:
            self.give(buffer)


class StoreFile:
    """The store of one layer, open for reading."""

    def __init__(self, path: Path, store: Store, content_key: str, direct: bool = False):
        """Raises UserError where the file is missing, cut short, or another one than the manifest
        has, and where the file system knows no `direct` reading."""
        end = read_end(path, store)
        if end.content_key != content_key:
            raise UserError(
                f"{path} is of another conversion", f"key {end.content_key[:12]}", "convert again"
            )
        self.store = store
        self.bytes_read = 0
        self._path = path
        self._checksums = end.checksums
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._descriptor = _open(path, direct)
        self._stamp = self._state()

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def read(self, expert: int, into: np.ndarray) -> None:
        """Fill `into`, uint8 of a record's size, with one expert. Raises UserError when that is not
        possible, or gives what was not written."""
        where = f"expert {expert} in {self._path}"
        view, start = into.data, expert * self.store.record.size
        try:
            done = 0
            while done < len(view):
                got = os.preadv(self._descriptor, [view[done:]], start + done)
                if got == 0:
                    found = f"{done} of {len(view)} bytes are there"
                    raise UserError(f"{where} is cut short", found, "convert again")
                done += got
        except OSError as error:
            do = "the disk may be failing; try again, or convert again"
            raise UserError(f"{where} cannot be read", str(error.strerror), do) from None
        self._check(expert, view, where)

    def _check(self, expert: int, view: memoryview, where: str) -> None:
        state = self._state()
        with self._lock:
            self.bytes_read += len(view)
            if state != self._stamp:
                self._stamp = state
                self._checked.clear()
            if expert in self._checked:
                return
        if zlib.crc32(view) != self._checksums[expert]:
            found = "its CRC-32 is another one"
            raise UserError(f"{where} is not what was written", found, "convert again")
        with self._lock:
            self._checked.add(expert)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def _open(path: Path, direct: bool) -> int:
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            found = "the file system does not know it"
            raise UserError(
                f"{path} cannot be read directly", found, "leave --direct out"
            ) from None
        raise UserError(f"{path} cannot be opened", str(error.strerror)) from None
    if direct and not flag:
        import fcntl

        if not hasattr(fcntl, "F_NOCACHE"):
            os.close(descriptor)
            raise UserError("this system has no way around its page cache", do="leave --direct out")
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


class StoredExpert:
    """One expert in memory: called as a function of any token count that the graph has."""

    def __init__(
        self, buffer: np.ndarray, weights: Weights, functions: Mapping[Shape, LoadedFunction]
    ) -> None:
        first = next(iter(functions.values()))
        self.inputs = tuple(one for one in first.inputs if one.name not in weights)
        self.outputs, self.states = first.outputs, first.states
        self.buffer = buffer
        self._weights = weights
        self._functions = functions

    def make_state(self) -> None:
        """Experts keep nothing."""

    def predict(self, inputs: Mapping[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        """Run the function for as many tokens as there are."""
        function = self._functions[inputs[FFN_INPUT].shape]
        return function.predict({**inputs, **self._weights})


class Graph:
    """The package that computes experts that are alike: its functions by the shape of their
    input."""

    def __init__(self, folder: Path, shard: Shard, runtime: str, **options: Any) -> None:
        self.shard = shard
        self.names = {
            port.slot.removeprefix(f"{WEIGHT}."): (port.name, port.shape)
            for port in shard.functions[0].ports.inputs
            if port.root == WEIGHT
        }
        package = open_package(folder / shard.path, runtime, **options)
        self.functions: dict[Shape, LoadedFunction] = {}
        for entry in shard.functions:
            function = package.function(entry.name)
            check_function(function, entry, f"{folder / shard.path}: function {entry.name}")
            (given,) = (port for port in entry.ports.inputs if port.root == FFN_INPUT)
            self.functions[given.shape] = function

    def require(self, record: Record, path: str) -> None:
        """Raise UserError unless a record has just the weights that the graph takes."""
        found = {weight.name: weight.shape for weight in record.weights}
        wanted = {slot: shape for slot, (_, shape) in self.names.items()}
        if found != wanted:
            odd = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
            raise UserError(
                f"{path} does not hold what {self.shard.path} computes", odd[0], "convert again"
            )


class StoreSource:
    """Loads experts from the stores of a conversion."""

    def __init__(
        self, folder: Path, manifest: Manifest, runtime: str, direct: bool = False, **options: Any
    ) -> None:
        """Opens every store and every graph. Raises UserError where one is missing or not sound."""
        self._buffers, self._scratch = Buffers(), Buffers()
        self._files: dict[str, StoreFile] = {}
        self._graphs: dict[str, Graph] = {}
        self._whole: dict[str, Record] = {}
        self._experts: dict[FunctionKey, int] = {}
        shards = {shard.path: shard for shard in manifest.shards}
        for path, shard in shards.items():
            if (store := shard.store) is None:
                continue
            if store.graph not in shards:
                raise UserError(f"{path} is computed by nothing", store.graph, "convert again")
            if store.graph not in self._graphs:
                self._graphs[store.graph] = Graph(folder, shards[store.graph], runtime, **options)
            self._graphs[store.graph].require(store.record, path)
            self._files[path] = StoreFile(folder / path, store, shard.content_key, direct)
            self._whole[path] = store.record.expanded
            for entry in shard.functions:
                (self._experts[FunctionKey(path, entry.name)],) = entry.experts

    @property
    def paths(self) -> list[str]:
        """The stores."""
        return list(self._files)

    @property
    def bytes_read(self) -> int:
        """What has been read of the files so far."""
        return sum(file.bytes_read for file in self._files.values())

    def size(self, key: FunctionKey) -> int:
        """What an expert takes in memory. Raises UserError where there is none of this name."""
        self._expert(key)
        return self._whole[key.path].size

    def load(self, key: FunctionKey) -> StoredExpert:
        """Read one expert, and expand it. Raises UserError as `StoreFile.read` does."""
        expert, file, whole = self._expert(key), self._files[key.path], self._whole[key.path]
        graph = self._graphs[file.store.graph]
        buffer = self._buffers.take(whole.size)
        try:
            weights = self._weights(file, expert, whole, buffer)
        except BaseException:
            self._buffers.give(buffer)
            raise
        named = {graph.names[name][0]: value for name, value in weights.items()}
        return StoredExpert(buffer, named, graph.functions)

    def release(self, key: FunctionKey, expert: Any) -> None:
        """Its memory is the next one's."""
        self._buffers.give(expert.buffer)

    def _expert(self, key: FunctionKey) -> int:
        if key not in self._experts:
            raise UserError(f"{key.path} holds no such expert", key.name, "convert again")
        return self._experts[key]

    def _weights(self, file: StoreFile, expert: int, whole: Record, buffer: np.ndarray) -> Weights:
        record = file.store.record
        if record.is_plain:
            file.read(expert, buffer)
            return views(whole, buffer)
        with self._scratch.lent(record.size) as read:
            file.read(expert, read)
            return expanded(record, read, whole, buffer)


def views(record: Record, buffer: np.ndarray) -> Weights:
    """The weights of a record that are all fp16, over its memory: by name, of the graph's
    shapes."""
    return {
        weight.name: buffer[weight.arrays[0].bytes].view(np.float16).reshape(weight.shape)
        for weight in record.weights
    }


def expanded(record: Record, read: np.ndarray, whole: Record, buffer: np.ndarray) -> Weights:
    """The weights of `record`, which `read` holds, as fp16 in `buffer`."""
    from ane_moe.loop.expert_expansion import expand  # torch, which plain ones do without

    weights = views(whole, buffer)
    for weight in record.weights:
        expand(weight, read, weights[weight.name])
    return weights
