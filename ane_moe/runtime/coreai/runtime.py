"""Apple's Core AI runtime behind the interface that every runtime has.

It executes an `.aimodel`, or the twin of an `.mlpackage` (`twin.py`), on the CPU. Apple's Python
packages run on Linux too, so that what a package computes can be held to a runtime that is not
ours.
"""

import asyncio
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVarTuple

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import temporary_folder
from ane_moe.json_file import read_json
from ane_moe.mlprogram.program import Feature, Interface, TensorType
from ane_moe.mlprogram.reader import OpenProgram, open_program
from ane_moe.mlprogram.weights import weights_of
from ane_moe.package_form import ASSET, DIGEST, METADATA, PROGRAM
from ane_moe.runtime.coreai.installed import INSTALL, core_ai, quiet
from ane_moe.runtime.coreai.names import OperationName, read_names
from ane_moe.runtime.coreai.twin import MAIN, save_twin
from ane_moe.runtime.inputs import check_inputs
from ane_moe.runtime.interface import Intermediate, NotObserved, Observer
from ane_moe.runtime.numpy_dtypes import NUMPY

VERSION = "2.0"  # of assets, as coreai-core 1.0.0b3 writes them
DTYPES = {
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bfloat16": "bf16",
    **{name: name for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16")},
}
LOGGER = ("IntermediateLogger", "CompileIdentifiers")
DAMAGED = "the asset is damaged: make it again"


@dataclass(frozen=True)
class CoreAiState:
    """The states of one sequence, by name: Core AI's own arrays, which calls change."""

    arrays: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """A copy of one state's contents."""
        return np.array(self.arrays[name].numpy())


class CoreAiFunction:
    """A function that Core AI has loaded. Calls of several threads follow each other."""

    in_part = True  # what it folds, or does as part of something else, it does not show

    def __init__(self, model: "Model", name: str, where: str, interface: Interface | None = None):
        """`interface` is what a package declares (None: what the asset says)."""
        self._model, self._name, self._where = model, name, where
        self._native = model.load(name, where)
        declared = interface or _interface(self._native.desc)
        self.inputs, self.outputs, self.states = declared.inputs, declared.outputs, declared.states

    def make_state(self) -> CoreAiState:
        """A fresh state, all zeros."""
        runtime = core_ai("coreai.runtime")
        return CoreAiState({one.name: runtime.NDArray(_zeros(one)) for one in self.states})

    def predict(
        self, inputs: Mapping[str, np.ndarray], state: CoreAiState | None = None
    ) -> dict[str, np.ndarray]:
        """Run once. Raises UserError for inputs or a state that do not fit, and where Core AI
        refuses the call."""
        return self._called(self._native, inputs, state)

    def intermediates(self) -> tuple[Intermediate, ...]:
        """The operations that have a name, in the order of the program. Raises NotObserved as
        `observe` does."""
        names = sorted(set(self._model.names(self._where).values()))
        return tuple(Intermediate(one.type, one.output, None) for one in names)

    def observe(
        self, inputs: Mapping[str, np.ndarray], observer: Observer, state: CoreAiState | None = None
    ) -> dict[str, np.ndarray]:
        """As `predict`, showing `observer` the operations that have a name (`names.py`), through
        Core AI's intermediate logger; runs twice.

        Of several of Core AI's operations behind one name the last has its value: which that is,
        the first run tells, in a state of its own. Raises NotObserved where there are no names, and
        where this version of Core AI has no such logger.
        """
        names, last = self._model.names(self._where), dict[OperationName, int]()

        def note(number: int, _: Any) -> None:
            last[names[number]] = number

        def show(number: int, value: Any) -> None:
            name = names[number]
            observer(name.type, name.output, {name.output: value()})

        self._logged(names, note, inputs, self.make_state() if self.states else None)
        return self._logged(last.values(), show, inputs, state)

    def _logged(
        self,
        numbers: Iterable[int],
        told: Callable[[int, Callable[[], np.ndarray]], None],
        inputs: Mapping[str, np.ndarray],
        state: CoreAiState | None,
    ) -> dict[str, np.ndarray]:
        """Run once; `told` is called with the number of each of Core AI's operations that is asked
        for as it ends, and what copies its value."""
        runtime, failed = core_ai("coreai.runtime"), list[Exception]()

        def log(values: Sequence[Any], kind: str, made: Any) -> None:
            if kind != "output" or not values or values[0] is None or failed:
                return
            try:
                told(made.id, lambda: np.array(runtime.NDArray._wrap(values[0]).numpy()))
            except Exception as error:  # which must not pass through Core AI
                failed.append(error)

        asked = [runtime.CompileIdentifiers(number) for number in numbers]
        logger = runtime.IntermediateLogger(asked, log)
        native = self._model.load(self._name, self._where, intermediate_logger=logger)
        results = self._called(native, inputs, state)
        if failed:
            raise failed[0]
        return results

    def _called(
        self, native: Any, inputs: Mapping[str, np.ndarray], state: CoreAiState | None
    ) -> dict[str, np.ndarray]:
        runtime = core_ai("coreai.runtime")
        arrays = check_inputs(self.inputs, dict(inputs), self._where)
        given = {name: runtime.NDArray(np.ascontiguousarray(each)) for name, each in arrays.items()}
        call = native(given, self._kept(state))
        results = self._model.wait(call, f"Core AI could not run {self._where}")
        return {one.name: np.array(results[one.name].numpy()) for one in self.outputs}

    def _kept(self, state: CoreAiState | None) -> dict[str, Any]:
        if not self.states:
            return {}
        if not isinstance(state, CoreAiState):
            raise UserError(f"{self._where} needs a state", do="make one with make_state()")
        for feature in self.states:
            array = state.arrays.get(feature.name)
            if array is None or tuple(array.shape) != feature.type.shape:
                raise UserError(f"the state does not fit {self._where}", feature.name)
        return {one.name: state.arrays[one.name] for one in self.states}


Given = TypeVarTuple("Given")  # arguments of a callback


class _Loop(asyncio.SelectorEventLoop):
    """Core AI never lets go of what `call_soon_threadsafe` gives it, once a call: a handle, on
    which the call's results hang. Here it gets none."""

    def call_soon_threadsafe(
        self, callback: Callable[[*Given], object], *args: *Given, context: Context | None = None
    ) -> Any:
        super().call_soon_threadsafe(callback, *args, context=context)


class Model:
    """An asset that Core AI has compiled, and the loop in which its calls run."""

    def __init__(self, path: Path):
        """Raises UserError where Core AI cannot load it."""
        assets = core_ai("coreai.authoring.asset")
        self._loop, self._lock = _Loop(), threading.Lock()
        self._stack = AsyncExitStack()
        weakref.finalize(self, _close, self._loop, self._stack)

        async def entered() -> Any:
            asset = assets.AIModelAsset.load(path)
            return await self._stack.enter_async_context(asset.executable())

        with quiet():
            self._native = self.wait(entered(), f"Core AI could not load {path}")

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._native.function_names)

    def load(self, name: str, where: str, **options: Any) -> Any:
        """Core AI's own function. Raises UserError where there is none of this name."""
        if name not in self.functions:
            raise UserError(f"there is no {where}", do=f"functions: {', '.join(self.functions)}")
        with quiet():
            return self._native.load_function(name, **options)

    def names(self, where: str) -> dict[int, OperationName]:
        """What Core AI's operations are called, by its numbers for them. Raises NotObserved where
        they have no names, and where Core AI does not tell them."""
        missing = [one for one in LOGGER if not hasattr(core_ai("coreai.runtime"), one)]
        if missing:
            raise NotObserved("this version of Core AI shows no intermediates", missing[0], INSTALL)
        try:
            names = read_names(self._native._debug_infos)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            raise NotObserved("Core AI tells of operations in another form", found) from None
        if not names:
            raise NotObserved(f"{where} does not name its operations", do="make the asset again")
        return names

    def wait(self, call: Any, failed: str) -> Any:
        """What an asynchronous call gives. Raises UserError with what Core AI says."""
        with self._lock:
            try:
                return self._loop.run_until_complete(call)
            except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
                found = " ".join(str(error).split())
                raise UserError(failed, found, DAMAGED) from None


def _close(loop: asyncio.AbstractEventLoop, stack: AsyncExitStack) -> None:
    loop.run_until_complete(stack.aclose())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


class AssetPackage:
    """An `.aimodel` as it lies on disk."""

    def __init__(self, path: Path):
        """Raises UserError for one that is damaged."""
        check_asset(path)
        self._path, self._model = path, Model(path)
        self.functions = self._model.functions

    def function(self, name: str | None = None, *, eager: bool = False) -> CoreAiFunction:
        """Load a function, the first one when None. Raises UserError for an unknown name."""
        name = name or self.functions[0]
        return CoreAiFunction(self._model, name, f"function '{name}' of {self._path}")

    def resident_bytes(self, name: str) -> int:
        """A function's share of the program file, which is in memory as a whole."""
        return (self._path / PROGRAM).stat().st_size // len(self.functions)


class TwinPackage:
    """An `.mlpackage` whose functions Core AI executes: a twin is made of each when asked for."""

    def __init__(self, program: OpenProgram):
        self.functions = program.functions
        self._program = program

    def function(self, name: str | None = None, *, eager: bool = False) -> CoreAiFunction:
        """Make and load the twin of a function, the default one when None. Raises UserError for an
        unknown name, and for an operation that the twin lacks."""
        name = name or self._program.default_function
        program = self._program.read((name,))
        with temporary_folder() as scratch:
            path = scratch / f"{MAIN}{ASSET}"
            save_twin(program, name, path)
            model = Model(path)
        where = f"the twin of function '{name}' of {self._program.path}"
        return CoreAiFunction(model, MAIN, where, program.interfaces[name])

    def resident_bytes(self, name: str) -> int:
        """Memory that the weights of a function take: fp16."""
        function = self._program.read((name,)).functions[name]
        return sum(2 * weight.elements for weight in weights_of(function))


def open_package(path: Path) -> AssetPackage | TwinPackage:
    """Open an `.aimodel`, or an `.mlpackage` for its twins.

    Raises UserError where Core AI is not installed, or what is there cannot be read.
    """
    core_ai("coreai.runtime")
    return AssetPackage(path) if path.suffix == ASSET else TwinPackage(open_program(path))


def session_options(memory_mb: float | None, stored_bytes: int) -> dict[str, Any]:
    """See `ane_moe.runtime.session_options`."""
    if memory_mb is not None:
        raise UserError("Core AI takes what memory it needs", do="leave --memory-mb out")
    return {}


def check_asset(path: Path) -> None:
    """Raise UserError unless the program of an `.aimodel` is the one that was written, for this
    version of Core AI: it does not look at the digest beside it."""
    for name in (PROGRAM, DIGEST, METADATA):
        if not (path / name).is_file():
            raise UserError(f"{path} is no Core AI asset", f"no {name}", DAMAGED)
    with (path / PROGRAM).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").digest()
    if found != (path / DIGEST).read_bytes():
        raise UserError(f"{path / PROGRAM} is not what was written", "another sha256", DAMAGED)
    try:
        found_version = read_json(path / METADATA).get("assetVersion")
    except UserError as error:
        raise UserError(f"{path} cannot be read", str(error), DAMAGED) from None
    if found_version != VERSION:
        raise UserError(
            f"{path} is of another version of Core AI's assets",
            f"{found_version!r}, not {VERSION!r}",
            "make it again",
        )


def _interface(described: Any) -> Interface:
    """What an asset says of a function."""

    def features(names: list[str], descriptor: Any) -> tuple[Feature, ...]:
        return tuple(_feature(name, descriptor(name)) for name in names)

    return Interface(
        features(described.input_names, described.input_descriptor),
        features(described.output_names, described.output_descriptor),
        features(described.state_names, described.state_descriptor),
    )


def _feature(name: str, array: Any) -> Feature:
    dtype = str(array.dtype)
    if dtype not in DTYPES:
        raise UserError(f"'{name}' is of a type that is not executed", dtype)
    return Feature(name, TensorType(DTYPES[dtype], tuple(array.shape)))


def _zeros(feature: Feature) -> np.ndarray:
    if any(size is None for size in feature.type.shape):
        raise UserError(f"state '{feature.name}' has no fixed shape")
    return np.zeros([size or 0 for size in feature.type.shape], NUMPY[feature.type.dtype])
