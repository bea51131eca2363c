"""Which experts share a function: those that tokens choose together, so that a token calls few
functions.

Groups keep their sizes, so the cost of a layer is the number of functions a token calls. From two
starts (index order, and experts gathered one by one by what they save) the best exchange of two
experts is made until none helps. All exchanges are scored exactly, at once, by two matrix products.
N = tokens, E = experts, G = experts per function.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.files import write_named_by_user
from ane_moe.routing.routing_trace import RoutingTrace

FORMAT = 1
FIT_SHARE = 2 / 3  # of the tokens; the gain is counted on the rest
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class LayerGain:
    """Functions a token calls in one layer, on the tokens left out of the fit: grouped by index and
    as found. `fitted` is the latter on the tokens of the fit, `ungrouped` how many experts a token
    chooses."""

    ungrouped: float
    index_order: float
    grouped: float
    fitted: float


@dataclass(frozen=True)
class Grouping:
    """`layers` gives each layer's groups, each sorted, in the order of their first experts; every
    expert is in one."""

    experts_per_function: int
    layers: Mapping[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class GroupingReport:
    grouping: Grouping
    tokens_fitted: int
    tokens_left_out: int
    gains: Mapping[int, LayerGain]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "experts_per_function": self.grouping.experts_per_function,
            "tokens_fitted": self.tokens_fitted,
            "tokens_left_out": self.tokens_left_out,
            "functions_per_token": {str(layer): vars(gain) for layer, gain in self.gains.items()},
        }


def group_experts(trace: RoutingTrace, experts_per_function: int) -> GroupingReport:
    """Group each layer's experts on the first two thirds of the tokens, and count on the others
    what it gains.

    Raises UserError for a trace of fewer than three tokens and a senseless group size.
    """
    count = len(trace.tokens)
    if experts_per_function < 1 or count < 3:
        raise UserError(
            "there is nothing to group",
            f"{experts_per_function} experts per function, {count} tokens",
            "give 2 or more experts per function, and a trace of some hundred tokens",
        )
    cut = int(count * FIT_SHARE)
    groups: dict[int, tuple[tuple[int, ...], ...]] = {}
    gains: dict[int, LayerGain] = {}
    for layer, routing in trace.layers.items():
        mask = routing.mask()
        by_index = index_order(routing.experts, experts_per_function)
        found = best_groups(mask[:cut], experts_per_function)
        groups[layer] = groups_of(found)
        gains[layer] = LayerGain(
            float(mask[cut:].sum(1).mean()),
            calls(mask[cut:], by_index),
            calls(mask[cut:], found),
            calls(mask[:cut], found),
        )
    return GroupingReport(Grouping(experts_per_function, groups), cut, count - cut, gains)


def index_order(experts: int, size: int) -> np.ndarray:
    """Group of each expert, int `[E]`, when neighbours share a function."""
    return np.arange(experts) // size


def calls(mask: np.ndarray, group: np.ndarray) -> float:
    """Mean number of groups that the tokens of `mask [N,E]` touch under `group [E]`."""
    return float((_counts(mask, group) > 0).sum(1).mean())


def best_groups(mask: np.ndarray, size: int) -> np.ndarray:
    """Group of each expert, int `[E]`: the better of the two starts after all exchanges that help.
    Deterministic."""
    starts = (index_order(mask.shape[1], size), gathered(mask, size))
    return min((exchanged(mask, start) for start in starts), key=lambda group: calls(mask, group))


def gathered(mask: np.ndarray, size: int) -> np.ndarray:
    """Fill group after group: first the most used expert left, then whoever saves most calls."""
    experts = mask.shape[1]
    group = np.full(experts, -1)
    used = mask.sum(0)
    for number in range(-(-experts // size)):
        touched = np.zeros(len(mask), bool)
        for place in range(min(size, experts - number * size)):
            score = used if place == 0 else mask[touched].sum(0)
            best = int(np.argmax(np.where(group < 0, score, -1)))
            group[best] = number
            touched |= mask[:, best]
    return group


def exchanged(mask: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Make the exchange that saves most, again and again, until none saves anything."""
    group = group.copy()
    while True:
        change = exchange_costs(mask, group)
        best = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[best] >= 0:
            return group
        first, second = int(best[0]), int(best[1])
        group[first], group[second] = group[second], group[first]


def exchange_costs(mask: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Calls (summed over tokens) that exchanging experts a and b would add, fp64 `[E,E]`; 0 within
    a group.

    A call is added where b's token touches nothing in a's group, and saved where a is alone in its
    group and b is not chosen; the same the other way round.
    """
    chosen = mask.astype(np.float32)
    counts = _counts(mask, group)  # (N, groups)
    untouched = (counts == 0).astype(np.float32)
    alone = (mask & (counts[:, group] == 1)).astype(np.float32)  # (N, E)
    added = (untouched.T @ chosen).astype(np.float64)[group]  # (E, E): [a, b], b enters a's group
    saved = alone.sum(0, dtype=np.float64)[:, None] - (alone.T @ chosen).astype(np.float64)
    one_way = added - saved
    both = one_way + one_way.T
    both[group[:, None] == group[None, :]] = 0
    return both


def groups_of(group: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Experts of each group, in the order of their first experts."""
    found = [tuple(np.flatnonzero(group == number).tolist()) for number in np.unique(group)]
    return tuple(sorted(found))


def write_grouping(grouping: Grouping, path: Path) -> None:
    """Write JSON atomically. Raises UserError when the file cannot be written."""
    document = {
        "format": FORMAT,
        "experts_per_function": grouping.experts_per_function,
        "layers": {str(layer): groups for layer, groups in grouping.layers.items()},
    }
    write_named_by_user(path, json.dumps(document) + "\n")


def read_grouping(path: Path) -> Grouping:
    """Read and check a grouping. Raises UserError when it is none, or its groups are not of the
    size it says."""
    try:
        document = json.loads(path.read_text()) if path.stat().st_size <= MAX_BYTES else None
        if document is None or document["format"] != FORMAT:
            raise ValueError("another format")
        size = document["experts_per_function"]
        layers = {
            int(layer): _checked(groups, size) for layer, groups in document["layers"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a grouping",
            f"{type(error).__name__}: {error}",
            "make one with `ane-moe group`",
        ) from None
    return Grouping(size, layers)


def _checked(groups: Any, size: Any) -> tuple[tuple[int, ...], ...]:
    """Groups of `size` experts (one may be smaller) that hold 0 to E - 1 once each."""
    found = tuple(tuple(sorted(group)) for group in groups)
    experts = sorted(expert for group in found for expert in group)
    sizes = sorted(map(len, found), reverse=True)
    if (
        type(size) is not int
        or not experts
        or any(type(expert) is not int for expert in experts)
        or experts != list(range(len(experts)))
        or any(one != size for one in sizes[:-1])
        or not 0 < sizes[-1] <= size
    ):
        raise ValueError(
            f"groups of {sorted(set(sizes))} experts, {len(experts)} in all, where {size} were said"
        )
    return tuple(sorted(found))


def _counts(mask: np.ndarray, group: np.ndarray) -> np.ndarray:
    """How many experts of each group a token chose, `[N,groups]`."""
    members = np.zeros((len(group), int(group.max()) + 1), np.float32)
    members[np.arange(len(group)), group] = 1
    return (mask.astype(np.float32) @ members).astype(np.int64)
