"""Core ML itself, behind the interface every runtime has (macOS).

Drives coremltools' `CompiledMLModel`. Facts of coremltools 9's native binding
(coremlpython/CoreMLPython*.mm) that show here: it takes float32, float64, int32 and int8 arrays
that are writable, and no float16; it returns float16 outputs widened to float32; it offers no
output backings, so every call allocates its outputs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.coreml_tools import ct
from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Feature, Interface
from ane_moe.mlprogram.reader import open_program
from ane_moe.mlprogram.weights import unique_bytes, weights_of
from ane_moe.runtime.coreml import trial as child
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from ane_moe.runtime.inputs import check_inputs, shape_fits, type_text

UNITS = {
    "cpu_and_ne": ct.ComputeUnit.CPU_AND_NE,
    "cpu_only": ct.ComputeUnit.CPU_ONLY,
    "cpu_and_gpu": ct.ComputeUnit.CPU_AND_GPU,
    "all": ct.ComputeUnit.ALL,
}

# What the binding is given for a declared type, and what it returns.
PASSED_AS = {
    "fp16": np.float32,
    "fp32": np.float32,
    "fp64": np.float64,
    "int32": np.int32,
    "int8": np.int8,
}

# Fragments of Core ML's messages and what stood behind them.
CAUSES = (
    # Anemll issue 5, VoxCPMANE issue 15: files that a download left incomplete
    (
        "`nil` unless the model type is ML Program",
        "the package is incomplete; download or convert it again",
    ),
    ("Could not open", "the package is incomplete; download or convert it again"),
    # coremltools issue 2631, and reports of error -14 with stateful models
    (
        "error code: -14",
        "the Neural Engine compiler refused it, often for a state whose last axis is no multiple "
        "of "
        "32; run `ane-moe verify` for the rules it breaks, or try --units cpu_only",
    ),
    (
        "ANECCompile",
        "the Neural Engine compiler refused it; run `ane-moe verify` for the rules it breaks, or "
        "try "
        "--units cpu_only",
    ),
    ("macOS >= 15.0", "states and functions need macOS 15 or later"),
)


@dataclass(frozen=True)
class CoreMLState:
    """The states of one sequence, usable with every function of the package it was made from."""

    package_key: str
    native: Any


class CoreMLFunction:
    """One function of a package, loaded by Core ML. `model` is coremltools' CompiledMLModel."""

    def __init__(
        self, package: Path, package_key: str, name: str, interface: Interface, model: Any
    ):
        self.package_key = package_key
        self.name = name
        self.inputs, self.outputs, self.states = (
            interface.inputs,
            interface.outputs,
            interface.states,
        )
        self.model = model
        self._where = f"function {name!r} of {package}"

    def make_state(self) -> CoreMLState:
        """A new state, all zeros.

        Raises UserError when Core ML cannot make one (before macOS 15).
        """
        with _core_ml_errors(f"Core ML could not make a state for {self._where}"):
            return CoreMLState(self.package_key, self.model.make_state())

    def predict(
        self, inputs: Mapping[str, np.ndarray], state: CoreMLState | None = None
    ) -> dict[str, np.ndarray]:
        """Run once: `inputs` maps every input to an array of its declared shape; outputs have their
        declared types.

        Raises UserError for missing, unknown or misshapen inputs, a missing state or one of another
        package, an error from Core ML, and outputs that are missing or not of the declared shape
        and type.
        """
        passed = self._passed(inputs)
        native = self._native_state(state)
        with _core_ml_errors(f"Core ML could not run {self._where}"):
            returned = self.model.predict(passed, native)
        return {feature.name: self._output(feature, returned) for feature in self.outputs}

    def run_on_zeros(self) -> None:
        """Run once for what it shows and does rather than for its outputs. Raises UserError as
        `predict` does."""
        zeros = {
            feature.name: np.zeros(
                [size or 1 for size in feature.type.shape], PASSED_AS[feature.type.dtype]
            )
            for feature in self.inputs
        }
        self.predict(zeros, self.make_state() if self.states else None)

    def _passed(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For the binding, which refuses read-only memory and takes strides at their word."""
        arrays = check_inputs(self.inputs, inputs, self._where)
        passed = {feature.name: PASSED_AS[feature.type.dtype] for feature in self.inputs}
        return {name: np.require(array, passed[name], ["C", "W"]) for name, array in arrays.items()}

    def _native_state(self, state: CoreMLState | None) -> Any:
        if not self.states:
            return None
        names = ", ".join(feature.name for feature in self.states)
        if state is None:
            raise UserError(
                f"{self._where} has states ({names})",
                "a call without one",
                "pass `fn.make_state()`",
            )
        if not isinstance(state, CoreMLState) or state.package_key != self.package_key:
            raise UserError(
                f"the state given to {self._where} belongs to something else",
                _owner(state),
                "use the state that a function of this package made",
            )
        return state.native

    def _output(self, feature: Feature, returned: Mapping[str, Any]) -> np.ndarray:
        where = f"output {feature.name!r} of {self._where}"
        value = returned.get(feature.name)
        if not isinstance(value, np.ndarray):
            raise UserError(
                f"{where} is missing", f"{', '.join(returned) or 'no outputs'}", "convert it again"
            )
        if not shape_fits(feature, value.shape):
            raise UserError(
                f"{where} is {type_text(feature)}", f"shape {list(value.shape)}", "convert it again"
            )
        if feature.type.dtype == "fp16":
            return _as_fp16(value, where)
        if value.dtype != PASSED_AS[feature.type.dtype]:
            raise UserError(
                f"{where} is {type_text(feature)}", str(value.dtype), "convert it again"
            )
        return np.ascontiguousarray(value)


class CoreMLPackage:
    """An opened package: its program is parsed and its files are hashed once, functions are loaded
    when asked for.

    The compiled model is kept in `cache`. A function not yet known to be good is first loaded and
    run on zeros in a child process, for at most `time_limit_seconds`; `trial=False` skips that.
    """

    def __init__(
        self,
        path: Path,
        *,
        units: str = "cpu_and_ne",
        cache: ModelCache | None = None,
        time_limit_seconds: float = child.TIME_LIMIT_SECONDS,
        trial: bool = True,
    ):
        self.path = path
        self._program = open_program(path)
        self.functions = self._program.functions
        self._units = units
        self._cache = cache or default_cache()
        self._key = self._cache.key(path)
        self._time_limit_seconds = time_limit_seconds
        self._trial = trial

    def function(self, name: str | None = None, *, eager: bool = False) -> CoreMLFunction:
        """Load a function, the default one when None; with `eager` it also runs once on zeros,
        since Core ML offers no other way to have its weights read.

        Raises UserError when the name is wrong or Core ML fails.
        """
        name = name or self._program.default_function
        interface = self._program.read((name,)).interfaces[name]
        _require_passable(interface, f"function {name!r} of {self.path}")
        self._try(name)
        # Core ML before macOS 15 refuses any function name, and a package of one function does not
        # need it.
        selected = name if len(self.functions) > 1 else None
        model = _load(
            self.path,
            self._cache,
            self._key,
            lambda compiled: ct.models.CompiledMLModel(str(compiled), UNITS[self._units], selected),
        )
        function = CoreMLFunction(self.path, self._key, name, interface, model)
        if eager:
            function.run_on_zeros()
        return function

    def resident_bytes(self, name: str) -> int:
        """Memory that the weights of a function take, as stored."""
        return unique_bytes(weights_of(self._program.read((name,)).functions[name]))

    def _try(self, name: str) -> None:
        if self._trial and not self._cache.is_good(self._key, f"{name}-{self._units}"):
            child.try_function(
                child.Trial(
                    str(self.path.resolve()),
                    name,
                    self._units,
                    str(self._cache.folder),
                    self._cache.os_build,
                    self._cache.limit_bytes,
                ),
                self._time_limit_seconds,
            )
            self._cache.mark_good(self._key, f"{name}-{self._units}")


def open_package(path: Path, **options: Any) -> CoreMLPackage:
    """Open the `.mlpackage` at `path` for the compute units `units` (a key of UNITS); see
    CoreMLPackage for the others.

    Raises UserError when Core ML is not there or the package cannot be read.
    """
    path = Path(path)
    require_core_ml()
    if (units := options.get("units", "cpu_and_ne")) not in UNITS:
        raise UserError("no such compute units", units, f"choose among {', '.join(UNITS)}")
    if path.suffix != ".mlpackage":
        raise UserError(
            f"{path} is not a package by its name",
            path.suffix or "no suffix",
            "name it *.mlpackage",
        )
    return CoreMLPackage(path, **options)


def session_options(memory_mb: float | None, stored_bytes: int) -> dict[str, Any]:
    """See `ane_moe.runtime.session_options`: Core ML sees to its memory itself."""
    if memory_mb is not None:
        raise UserError(
            "Core ML cannot be told how much memory weights may take",
            f"{memory_mb:g} MB",
            "leave --memory-mb out, or take the runtime reference",
        )
    return {}


def load_function(path: Path, function: str | None = None, **options: Any) -> CoreMLFunction:
    """Load one function of the `.mlpackage` at `path`; `options` as for `open_package`.

    Raises UserError when Core ML is not there, the package or the function name is wrong, or Core
    ML fails.
    """
    return open_package(path, **options).function(function)


def require_core_ml() -> None:
    """Raise UserError unless coremltools' native module is there."""
    try:
        import coremltools.libcoremlpython  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Core ML needs macOS and coremltools' native module",
            str(error),
            "use --runtime reference, which runs on any machine",
        ) from None


@functools.cache
def default_cache() -> ModelCache:
    """The cache in the user's Library, one per process."""
    return ModelCache()


def _load(path: Path, cache: ModelCache, key: str, load: Callable[[Path], Any]) -> Any:
    found = cache.find(key)
    if found is not None:
        try:
            return load(found)
        except RuntimeError:
            cache.discard(key)  # damage that sizes do not show; a fresh compilation decides
    compiled = compiled_package(path, cache, key)
    with _core_ml_errors(f"Core ML could not load {path}"):
        return load(compiled)


def compiled_package(path: Path, cache: ModelCache, key: str) -> Path:
    """The `.mlmodelc` of the package, from `cache` under `key` or compiled into it. Raises
    UserError."""
    with _core_ml_errors(f"Core ML could not compile {path}"):
        return cache.get(
            path,
            key,
            lambda destination: ct.models.utils.compile_model(str(path), str(destination)),
        )


def _require_passable(interface: Interface, where: str) -> None:
    for feature in interface.inputs + interface.outputs:
        if feature.kind != "array" or feature.type.dtype not in PASSED_AS:
            raise UserError(
                f"{feature.name!r} of {where} cannot be passed to Core ML from here",
                f"{feature.kind} {feature.type.dtype}",
                f"declare it as an array of {', '.join(PASSED_AS)}",
            )


def _as_fp16(value: np.ndarray, where: str) -> np.ndarray:
    """The binding widens fp16 exactly, so what does not narrow exactly was never fp16."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = value.astype(np.float16)
    if value.dtype.kind != "f" or not np.array_equal(
        narrow.astype(value.dtype), value, equal_nan=True
    ):
        raise UserError(
            f"{where} was declared fp16 but computed in more",
            f"{value.dtype} values between fp16's",
            "convert it again with fp16 outputs",
        )
    return np.ascontiguousarray(narrow)


def _owner(state: object) -> str:
    return (
        "a state of another package"
        if isinstance(state, CoreMLState)
        else f"a {type(state).__name__}"
    )


@contextmanager
def _core_ml_errors(what: str) -> Iterator[None]:
    """Native errors arrive as RuntimeError with Core ML's own words."""
    try:
        yield
    except RuntimeError as error:
        causes = [cause for fragment, cause in CAUSES if fragment in str(error)]
        raise UserError(what, str(error), causes[0] if causes else "") from error
