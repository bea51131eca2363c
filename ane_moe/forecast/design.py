"""What to put together so that Core ML places it on the engine: experts of a function, layers of a
shard.

Every function that would be planned is judged as its package would be (placement/predicted.py), by
estimates that take weights as 16 bits however they are stored. What a function lacks for a run on
the engine, more of the same gives: savings add up, and a run is paid once.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.forecast.compile_time import most_layers
from ane_moe.forecast.layer_kinds import plan_kinds
from ane_moe.forecast.planned_facts import PlannedFunction, facts_of_plan
from ane_moe.model.spec import ModelSpec, MoeSpec
from ane_moe.placement.estimates import estimate_book
from ane_moe.placement.predicted import judge
from ane_moe.placement.rules import RuleBook, rule_book
from ane_moe.placement.targets import Target

MOST_EXPERTS = 16  # of a function: a call reads all of them for the few that were chosen
MOST_LAYERS = 8  # of a shard; fewer where a chain of them takes long to compile
AUTO = "auto"


Routing = Literal["masked", "sparse"]


def routings(spec: ModelSpec) -> tuple[Routing, ...]:
    """The ways to compute experts that give what the model gives."""
    dispatched = any(isinstance(layer.ffn, MoeSpec) for layer in spec.layers)
    return ("masked", "sparse") if dispatched else ("masked",)


@dataclass(frozen=True)
class DesignedFunction:
    """A function of one layer, and of one expert where it is sparse: what its best run on the
    engine saves beyond its price, at least and at most, in ms, and what the cost decision makes of
    that. What other rules say of it is not in this."""

    routing: str
    kind: str
    layer: int | None
    tokens: int
    experts: int
    verdict: str
    margin_ms: tuple[float, float]

    @property
    def is_one_expert(self) -> bool:
        """Whether it is what `--experts-per-function` is a number of."""
        return self.routing == "sparse" and self.experts == 1


@dataclass(frozen=True)
class Design:
    """Functions by what becomes of them alone, and how many experts and layers to put into one;
    1 where one is placed, and where no number in reason is."""

    target: str
    os: int
    functions: tuple[DesignedFunction, ...]
    experts_per_function: int
    layers_per_shard: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "predicted"}

    def stays_on_cpu(self, tokens: int) -> tuple[str, ...]:
        """Kinds of function that are on the CPU with so many tokens, each alone."""
        found = (row for row in self.functions if row.tokens == tokens and row.verdict == "cpu")
        return tuple(dict.fromkeys(row.kind for row in found))


def design(
    spec: ModelSpec,
    target: Target,
    *,
    context: int | None = None,
    prefill: int = 64,
    lengths: tuple[int, ...] | None = None,
) -> Design:
    """Judge every function of a model's masked and sparse conversions, and say what to put
    together so that those of the fewest tokens are placed too. Raises UserError as `make_plan`."""
    book, rows = rule_book(target), []
    most, fewest = MOST_LAYERS, 1
    for routing in routings(spec):
        options = ConvertOptions(routing=routing, context=context, prefill=prefill, lengths=lengths)
        plan = plan_kinds(spec, options).plan
        rows += [_designed(entry, routing, book) for entry in facts_of_plan(plan)]
        if routing == "masked":
            most = most_layers(plan, target.name, MOST_LAYERS)
            fewest = min(tokens for _, tokens in plan.functions)
    price = estimate_book(target).run.most_ms
    experts = [[row] for row in rows if row.is_one_expert and row.tokens == 1]
    layers: dict[int, list[DesignedFunction]] = {}
    for row in rows:
        if row.routing == "masked" and row.tokens == fewest and row.layer is not None:
            layers.setdefault(row.layer, []).append(row)
    return Design(
        target.name,
        target.os,
        tuple(rows),
        _together(experts, price, MOST_EXPERTS),
        _together(layers.values(), price, most),
    )


def sizes_of(
    spec: ModelSpec, options: ConvertOptions, asked: tuple[str, str], target: Target
) -> tuple[int, int]:
    """Experts of a function and layers of a shard: numbers as asked, or AUTO for what `design`
    says of the options' calls. Raises UserError for anything else."""
    if AUTO not in asked:
        experts, layers = map(_number, asked)
        return experts, layers
    found = design(
        spec,
        target,
        context=options.context,
        prefill=options.prefill,
        lengths=options.lengths,
    )
    chosen = (found.experts_per_function, found.layers_per_shard)
    experts, layers = (
        best if text == AUTO else _number(text) for text, best in zip(asked, chosen, strict=True)
    )
    return experts, layers


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise UserError("a number of experts or layers is from 1 on, or auto", repr(text))
    return int(text)


def _designed(entry: PlannedFunction, routing: str, book: RuleBook) -> DesignedFunction:
    placed = judge(entry.facts, entry.shard.path, book)
    margins = [stretch.margin_ms for stretch in placed.stretches]
    least, most = max(margins, default=(-math.inf, -math.inf))
    return DesignedFunction(
        routing,
        entry.shard.kind,
        entry.shard.layer,
        entry.function.tokens,
        len(entry.function.experts),
        "ane" if least > 0 else "uncertain" if most > 0 else "cpu",
        (least, most),
    )


def _together(groups: Iterable[list[DesignedFunction]], price_ms: float, most: int) -> int:
    """How many times a group of functions has to be in one for it to be placed whatever is not
    known: as much as the neediest group takes; 1 where that is more than `most`."""
    needed = 1
    for group in groups:
        if all(row.margin_ms[0] > 0 for row in group):
            continue
        saved = sum(max(0.0, row.margin_ms[0] + price_ms) for row in group)
        times = math.floor(price_ms / saved) + 1 if saved else most + 1
        needed = max(needed, times)
    return needed if needed <= most else 1
