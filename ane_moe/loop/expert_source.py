"""Where experts come from: functions of packages, or records of stores. Whoever calls them does not
know which."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ane_moe.errors import UserError
from ane_moe.loop.expert_cache import FunctionKey
from ane_moe.manifest import ShardFunction
from ane_moe.model.port import shapes_of
from ane_moe.runtime import open_package
from ane_moe.runtime.interface import LoadedFunction, Package


class ExpertSource(Protocol):
    """Loads what the expert cache keeps. All of it may raise UserError."""

    def load(self, key: FunctionKey) -> LoadedFunction:
        """An expert, ready to run."""

    def size(self, key: FunctionKey) -> int:
        """What it takes in memory, in bytes."""

    def release(self, key: FunctionKey, function: LoadedFunction) -> None:
        """Nobody calls it any more."""


class PackageSource:
    """Functions of the packages in a folder, each package opened once. A function counts with the
    memory its weights take."""

    def __init__(
        self,
        folder: Path,
        entries: Mapping[FunctionKey, ShardFunction],
        runtime: str,
        **options: Any,
    ) -> None:
        self._folder = folder
        self._entries = entries

        @cache
        def package(path: str) -> Package:
            return open_package(folder / path, runtime, **options)

        self._package = package
        self._sizes: dict[FunctionKey, int] = {}

    def load(self, key: FunctionKey) -> LoadedFunction:
        """Load a function, and read its weights. Raises UserError when a package is damaged, or has
        the function with other inputs than the manifest implies."""
        function = self._package(key.path).function(key.name, eager=True)
        where = f"{self._folder / key.path}: function {key.name}"
        check_function(function, self._entries[key], where)
        return function

    def size(self, key: FunctionKey) -> int:
        """Raises UserError when the package lacks the function."""
        if key not in self._sizes:
            package = self._package(key.path)
            if key.name not in package.functions:
                raise UserError(
                    f"{self._folder / key.path} lacks an expert function", key.name, "convert again"
                )
            self._sizes[key] = package.resident_bytes(key.name)
        return self._sizes[key]

    def release(self, key: FunctionKey, function: LoadedFunction) -> None:
        """Its memory goes with it."""


class Sources:
    """Several sources as one: each by the paths that it serves, the first for all others."""

    def __init__(self, usual: ExpertSource, others: Mapping[str, ExpertSource]) -> None:
        self._usual = usual
        self._others = others

    def load(self, key: FunctionKey) -> LoadedFunction:
        return self._of(key).load(key)

    def size(self, key: FunctionKey) -> int:
        return self._of(key).size(key)

    def release(self, key: FunctionKey, function: LoadedFunction) -> None:
        self._of(key).release(key, function)

    def _of(self, key: FunctionKey) -> ExpertSource:
        return self._others.get(key.path, self._usual)


def check_function(function: LoadedFunction, entry: ShardFunction, what: str) -> None:
    """Raise UserError unless `function` declares exactly the inputs that the manifest says, by name
    and shape."""
    declared = {feature.name: feature.type.shape for feature in function.inputs}
    expected = shapes_of(entry.ports.inputs)
    if declared != expected:
        names = sorted(set(declared) | set(expected))
        differences = ", ".join(
            f"{name} {declared.get(name, 'absent')} where {expected.get(name, 'none')} was expected"
            for name in names
            if declared.get(name) != expected.get(name)
        )
        raise UserError(
            f"{what} has other inputs than the manifest implies", differences, "convert again"
        )
