"""Python values to Core ML's and back, as CoreMLPythonUtils.mm and CoreMLPythonArray.mm do it."""

import numpy as np

# CoreMLPythonArray.mm, `dataTypeOf`; int8 from the macOS 26 SDK on, which coremltools 9 is built
# with.
ACCEPTED = {("i", 4), ("i", 1), ("f", 4), ("f", 8)}


def to_native(value: object) -> np.ndarray:
    """A multi-array; numpy arrays only, as the other feature types have no place in an ML Program
    of tensors.

    Every conversion error is swallowed there and ends in this one message; read-only arrays fail in
    `mutable_data`.
    """
    if (
        isinstance(value, np.ndarray)
        and (value.dtype.kind, value.dtype.itemsize) in ACCEPTED
        and value.flags.writeable
    ):
        return value
    print("Error: value type not convertible:")
    print(value)
    raise RuntimeError("value type not convertible")


def to_python(value: np.ndarray) -> np.ndarray:
    """A copy; float16 is widened (`convertArrayValueToPython`: "py:array doesn't support fp16")."""
    return value.astype(np.float32 if value.dtype == np.float16 else value.dtype, copy=True)
