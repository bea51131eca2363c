"""What every runtime's loaded function looks like."""

from typing import Any, Protocol

import numpy as np

from ane_moe.runtime.program import Feature


class LoadedFunction(Protocol):
    """One function of a package, ready to run."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]

    def make_state(self) -> Any:
        """A fresh state, all zeros. Functions of one package may share it."""

    def predict(self, inputs: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
        """Run once; `state`, needed when the function declares states, is updated in place.

        Raises UserError for inputs that do not fit the declared names, shapes and dtypes.
        """
