"""What the Neural Engine's arithmetic, computed here, makes of a conversion: a prediction, beside
the same proof with exact sums. Plain dataclasses, named as in the JSON document."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOperation:
    """One operation of one function, over everything that was run.

    A sum of products (`terms` above 0) overflows at a partial sum of `limit`, other results at an
    fp16. `largest_partial` is what the terms that were met reach in the worst order,
    `largest_possible` what any terms reach whose inputs are as large as `largest_input`, which is
    harmless up to `safe_input`. `overflows` of `results` came out Inf, `on_the_way` of them though
    their whole sum is below the limit; `at_risk` would in some order of the sum. `dropped_share`
    is of the products other than zero.
    """

    path: str
    layer: int | None
    function: str
    op: str
    name: str
    terms: int
    limit: float
    largest_result: float
    largest_partial: float
    largest_possible: float
    largest_input: float
    safe_input: float | None
    overflows: int
    on_the_way: int
    at_risk: int
    results: int
    dropped_share: float

    @property
    def harmless_divisor(self) -> int | None:
        """The power of two by which its weights and bias had to be divided, for no order of its
        sums to overflow; None where none is needed, or the limit is not of a sum of products."""
        if not self.terms or not (self.overflows or self.at_risk):
            return None
        return 1 << max(0, math.floor(math.log2(self.largest_partial / self.limit))) + 1


@dataclass(frozen=True)
class RoutingCost:
    """Tokens of one layer with the model's experts: with exact sums, and as the engine adds."""

    layer: int
    tokens: int
    exact_agreement: float
    engine_agreement: float
    exact_near_tie_flips: int
    engine_near_tie_flips: int


@dataclass(frozen=True)
class ModelCost:
    """The whole model through one kind of function: with exact sums, and as the engine adds."""

    function: str
    tokens: int
    perplexity_golden: float | None
    perplexity_exact: float | None
    perplexity_engine: float | None
    mean_kl_exact: float
    mean_kl_engine: float
    top1_exact: float
    top1_engine: float


@dataclass(frozen=True)
class EngineReport:
    """Predicted for `chips` under `systems`; the results of the report it belongs to are by this
    arithmetic. `exact_failures` gates fail with exact sums too."""

    chips: tuple[str, ...]
    systems: tuple[int, ...]
    exact_failures: int
    dropped_share: float
    routing: tuple[RoutingCost, ...]
    models: tuple[ModelCost, ...]
    operations: tuple[EngineOperation, ...]
    predicted: bool = True

    @property
    def overflowing(self) -> tuple[EngineOperation, ...]:
        """Operations with results that came out Inf."""
        return tuple(one for one in self.operations if one.overflows)
