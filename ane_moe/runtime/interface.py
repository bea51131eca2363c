"""What every runtime's loaded function looks like."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ane_moe.errors import UserError
from ane_moe.mlprogram.program import Feature


class NotExecuted(UserError):
    """A sound function that a runtime has no way to execute."""


class NotObserved(UserError):
    """A function whose runtime cannot show what is between its inputs and its outputs."""


# Told an operation's type, its name, and what it gives, by name.
Observer = Callable[[str, str, Mapping[str, np.ndarray]], None]


@dataclass(frozen=True)
class Intermediate:
    """What an operation gives, without its numbers. `shape`: None where it is not known before the
    operation runs, as are single sizes."""

    op: str
    name: str
    shape: tuple[int | None, ...] | None


class Package(Protocol):
    """A package opened by a runtime: what all its functions share has been read."""

    functions: tuple[str, ...]

    def function(self, name: str | None = None, *, eager: bool = False) -> "LoadedFunction":
        """Load one function, the default one when none is named; with `eager` its weights are read
        now rather than in the first call.

        Raises UserError for an unknown function, an unsound one, or an op the runtime lacks.
        """

    def resident_bytes(self, name: str) -> int:
        """Memory that a function's weights take once loaded, in bytes. Raises UserError as
        `function` does."""


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


@runtime_checkable
class Observable(Protocol):
    """A loaded function that shows what is inside it. With `in_part` some of its operations are not
    shown, since the runtime made others of them."""

    in_part: bool

    def intermediates(self) -> tuple[Intermediate, ...]:
        """What `observe` will show, in the order of the program. Raises NotObserved."""

    def observe(
        self, inputs: Mapping[str, np.ndarray], observer: Observer, state: Any = None
    ) -> dict[str, Any]:
        """As `predict`, showing `observer` what each operation gives, once.

        Raises UserError as `predict` does, and NotObserved where nothing can be shown.
        """
