"""The module `coremltools.libcoremlpython`: same classes, signatures, checks and error texts; see
CoreMLPython.mm.

A compiled model is a folder `NAME.mlmodelc` with the package it came from inside. Arguments are
positional, as pybind methods without `py::arg` are. pybind's RuntimeError stands for every C++ and
Core ML error.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Program
from ane_moe.mlprogram.reader import read_program
from tests.standin import plans
from tests.standin.script import current, fault, user_info
from tests.standin.values import to_native, to_python

if TYPE_CHECKING:  # torch, for what is run and not for what is planned
    from ane_moe.runtime.reference.runtime import ReferenceFunction

COMPILED = ".mlmodelc"
NEWEST_SPECIFICATION = 10  # iOS 26, as MLMODEL_SPECIFICATION_VERSION_NEWEST in coremltools 9
UNABLE = "Unable to compute the prediction using ML Program. "  # as coremltools' tests quote it
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


class _NotConstructible:
    """A pybind class without `py::init`."""

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__module__}.{type(self).__name__}: No constructor defined!")

    @classmethod
    def _make(cls, *parts: Any) -> Any:
        made = object.__new__(cls)
        made._parts = parts
        return made


class _MLModelStructureProgramOperationProxy(_NotConstructible):
    """Parts: the function's name and the program's operation."""


class _MLModelStructureNeuralNetworkLayerProxy(_NotConstructible):
    pass


class _MLModelAssetProxy(_NotConstructible):
    """Parts: the path of a compiled model."""


class _MLCPUComputeDeviceProxy:
    pass


class _MLGPUComputeDeviceProxy:
    pass


class _MLNeuralEngineComputeDeviceProxy:
    def get_total_core_count(self) -> int:
        return 16


class _State(_NotConstructible):
    """Parts: the path of the compiled model and a state of the reference runtime."""

    def read_state(self, name: str, /) -> np.ndarray:
        return to_python(self._tensor(name).numpy())

    def write_state(self, name: str, value: object, /) -> None:
        tensor = self._tensor(name)
        native = to_native(value)
        if native.shape != tuple(tensor.shape):
            raise RuntimeError(
                user_info(f"cannot transfer {native.shape} to {tuple(tensor.shape)}")
            )
        tensor.numpy()[...] = native

    def _tensor(self, name: str) -> Any:
        tensors = self._parts[1].tensors
        if name not in tensors:
            raise RuntimeError(f"The state named {name} doesn't exist.")
        return tensors[name]


class _MLComputePlanProxy:
    def __init__(self) -> None:
        self._structure: Any = None
        self._placements: dict[int, plans.Placement] = {}

    @property
    def model_structure(self) -> Any:
        return self._structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any, /) -> Any:
        from coremltools.models.compute_plan import MLComputePlanDeviceUsage

        placement = self._placement(operation)
        if placement is None:
            return None
        return MLComputePlanDeviceUsage(
            _device(placement.preferred), [_device(name) for name in placement.supported]
        )

    def get_compute_device_usage_for_neuralnetwork_layer(self, layer: Any, /) -> Any:
        raise TypeError("Unable to cast Python instance to C++ type")

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any, /) -> Any:
        from coremltools.models.compute_plan import MLComputePlanCost

        placement = self._placement(operation)
        return None if placement is None else MLComputePlanCost(placement.cost)

    def _placement(self, operation: Any) -> plans.Placement | None:
        proxy = operation.__proxy__
        if not isinstance(proxy, _MLModelStructureProgramOperationProxy):
            raise TypeError("Unable to cast Python instance to C++ type")
        return self._placements.get(id(proxy._parts[1]))


class _MLModelProxy:
    def __init__(
        self,
        path: str,
        compute_units: str,
        function_name: str,
        optimization_hints: dict,
        asset: _MLModelAssetProxy | None = None,
        /,
    ) -> None:
        given = (path, compute_units, function_name, optimization_hints)
        if not all(
            isinstance(value, type_)
            for value, type_ in zip(given, (str, str, str, dict), strict=True)
        ):
            raise TypeError("__init__(): incompatible constructor arguments.")
        assert compute_units in UNITS, compute_units
        self._delete_on_exit = False
        if asset is not None:
            self._compiled = asset._parts[0]
        elif path.rstrip("/").endswith(COMPILED):
            self._compiled = path
        else:
            self._compiled = _compile(path, 'Error compiling model: "{}".')
            self._delete_on_exit = True
        started = time.perf_counter_ns()
        self._function = _load(self._compiled, function_name)
        self._load_ns = time.perf_counter_ns() - started
        self._predict_ns: int | None = None

    def __del__(self) -> None:
        if getattr(self, "_delete_on_exit", False):
            shutil.rmtree(self._compiled, ignore_errors=True)

    def predict(self, data: dict, state: _State | None, /) -> dict[str, np.ndarray]:
        inputs = {name: to_native(value) for name, value in data.items()}
        scripted = current().play("predict", self._function.name)
        started = time.perf_counter_ns()
        outputs = _predict(self._function, self._compiled, inputs, state)
        self._predict_ns = time.perf_counter_ns() - started
        return {
            name: _spoiled(value, scripted)
            for name, value in outputs.items()
            if scripted != "missing"
        }

    def batchPredict(self, batch: list, /) -> list[dict[str, np.ndarray]]:
        return [self.predict(data, None) for data in batch]

    def get_compiled_model_path(self) -> str:
        return self._compiled

    def get_load_duration_in_nano_seconds(self) -> int:
        return self._load_ns

    def get_last_predict_duration_in_nano_seconds(self) -> int | None:
        return self._predict_ns

    def newState(self) -> _State:
        return _State._make(_real(self._compiled), self._function.make_state())

    @staticmethod
    def auto_set_specification_version(model: bytes, /) -> bytes:
        """The stand-in leaves the version as it is; the binding lowers it to what the model
        needs."""
        if not isinstance(model, bytes):
            raise TypeError("auto_set_specification_version(): incompatible function arguments.")
        return model

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return NEWEST_SPECIFICATION

    @staticmethod
    def create_model_asset_from_path(path: str, /) -> Any:
        from coremltools.models.model import MLModelAsset

        return MLModelAsset(_MLModelAssetProxy._make(path))

    @staticmethod
    def create_model_asset_from_memory(specification: bytes, blobs: dict, /) -> Any:
        raise RuntimeError(user_info("assets from memory are beyond the stand-in"))

    @staticmethod
    def get_model_structure(compiled: str, /) -> Any:
        from tests.standin.structure import model_structure

        return model_structure(_program(compiled))

    @staticmethod
    def get_available_compute_devices() -> list:
        return [_device(name) for name in plans.UNITS["ALL"]]

    @staticmethod
    def get_all_compute_devices() -> list:
        return [_device(name) for name in plans.UNITS["ALL"]]

    @staticmethod
    def get_compute_plan(compiled: str, compute_units: str, /) -> Any:
        from coremltools.models.compute_plan import MLComputePlan, MLModelStructure

        from tests.standin.structure import model_structure

        plan = plans.read_plan(current().plan)
        program = _program(compiled)
        if plan.get("fault_function", program.default_function) == program.default_function:
            fault(plan.get("fault", "ok"), current().messages.get("plan", "scripted plan error"))
        proxy = _MLComputePlanProxy()
        whole = plan.get("program", True)
        proxy._structure = model_structure(program) if whole else MLModelStructure(None, None, None)
        proxy._placements = plans.place(program, plan, compute_units)
        return MLComputePlan(proxy)

    @staticmethod
    def compileModel(path: str, /) -> str:
        return _compile(path, "{}")


def _compile(path: str, message: str) -> str:
    """Copies the package into a new temporary folder, as Core ML leaves its result in one."""
    try:
        current().play("compile", Path(path).name)
        read_program(Path(path))
    except (RuntimeError, UserError) as error:
        raise RuntimeError(message.format(error)) from None
    compiled = Path(tempfile.mkdtemp()) / (Path(path).stem + COMPILED)
    shutil.copytree(path, compiled / "source.mlpackage")
    (compiled / "coremldata.bin").write_bytes(b"stand-in")
    return str(compiled)


def _load(compiled: str, function: str) -> "ReferenceFunction":
    from ane_moe.runtime.reference.runtime import ReferenceFunction

    current().play("load", function)
    program = _program(compiled)
    if function and function not in program.functions:
        raise RuntimeError(user_info(f"Function {function} was not found in the model."))
    return ReferenceFunction(program, function or program.default_function)


def _program(compiled: str) -> Program:
    source = Path(compiled) / "source.mlpackage"
    if not (Path(compiled) / "coremldata.bin").exists():
        raise RuntimeError(
            user_info(f"Unable to load model at {compiled}: a valid coremldata.bin is missing.")
        )
    try:
        return read_program(source)
    except UserError as error:
        raise RuntimeError(user_info(f"Unable to load model at {compiled}: {error}")) from None


def _predict(
    function: "ReferenceFunction",
    compiled: str,
    inputs: dict[str, np.ndarray],
    state: _State | None,
) -> dict[str, np.ndarray]:
    if function.states and state is None:  # Core ML's own words, coremltools issue 2519
        name = function.states[0].name
        raise RuntimeError(
            user_info(f"The input feature for {name} must be an MLState, but it was not.")
        )
    if state is not None and state._parts[0] != _real(compiled):
        raise RuntimeError(user_info("The state was created by another model."))
    try:
        return function.predict(inputs, None if state is None else state._parts[1])
    except UserError as error:
        failed = UNABLE if error.what.startswith("op ") else ""
        raise RuntimeError(user_info(f"{failed}{error}")) from None


def _spoiled(value: np.ndarray, scripted: str) -> np.ndarray:
    value = to_python(value)
    if scripted == "fp32":
        return value + np.float32(0.001)  # which fp16 does not hold
    if scripted == "wrong":
        return 2 * value + value.dtype.type(3)
    return value.reshape(-1) if scripted == "misshapen" else value


def _device(name: str) -> Any:
    from coremltools.models import compute_device

    return {
        "cpu": lambda: compute_device.MLCPUComputeDevice(_MLCPUComputeDeviceProxy()),
        "gpu": lambda: compute_device.MLGPUComputeDevice(_MLGPUComputeDeviceProxy()),
        "engine": lambda: compute_device.MLNeuralEngineComputeDevice(
            _MLNeuralEngineComputeDeviceProxy()
        ),
    }[name]()


def _real(compiled: str) -> str:
    return str(Path(compiled).resolve())
