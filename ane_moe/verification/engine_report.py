"""Two proofs of one conversion, by the engine's arithmetic and with exact sums, side by side."""

from collections.abc import Sequence
from pathlib import Path

from ane_moe.manifest import Manifest
from ane_moe.runtime.reference.engine.facts import CHIPS, SYSTEMS
from ane_moe.runtime.reference.engine.ledger import Ledger, Met, Site
from ane_moe.verification.engine_result import (
    EngineOperation,
    EngineReport,
    ModelCost,
    RoutingCost,
)
from ane_moe.verification.result import Comparison, FunctionModelResult, RoutingResult


def engine_report(
    out: Path, manifest: Manifest, ledger: Ledger, engine: Comparison, exact: Comparison
) -> EngineReport:
    """`engine` and `exact` are the same proof, by the engine's arithmetic and with exact sums;
    `ledger` is what the operations met in the first."""
    dropped, products = (
        sum(getattr(met, name) for met in ledger.sites.values()) for name in ("dropped", "products")
    )
    layers = {shard.path: shard.layer for shard in manifest.shards}
    return EngineReport(
        chips=CHIPS,
        systems=SYSTEMS,
        exact_failures=exact.failures,
        dropped_share=dropped / products if products else 0.0,
        routing=_routing_costs(exact.routing, engine.routing),
        models=_model_costs(exact.models, engine.models),
        operations=tuple(_operation(out, layers, *entry) for entry in ledger.sites.items()),
    )


def _operation(out: Path, layers: dict[str, int | None], site: Site, met: Met) -> EngineOperation:
    path = Path(site.package).relative_to(out).as_posix()
    safe = met.limit * met.largest_input / met.largest_possible if met.largest_possible else None
    return EngineOperation(
        path,
        layers.get(path),
        site.function,
        site.op,
        site.name,
        met.terms,
        met.limit,
        met.largest_result,
        met.largest_partial,
        met.largest_possible,
        met.largest_input,
        safe,
        met.overflows,
        met.on_the_way,
        met.at_risk,
        met.results,
        met.dropped_share,
    )


def _routing_costs(
    exact: Sequence[RoutingResult], engine: Sequence[RoutingResult]
) -> tuple[RoutingCost, ...]:
    return tuple(
        RoutingCost(
            one.layer,
            one.tokens,
            one.set_agreement,
            other.set_agreement,
            one.near_tie_flips,
            other.near_tie_flips,
        )
        for one, other in zip(exact, engine, strict=True)
    )


def _model_costs(
    exact: Sequence[FunctionModelResult], engine: Sequence[FunctionModelResult]
) -> tuple[ModelCost, ...]:
    return tuple(
        ModelCost(
            one.function,
            one.tokens,
            one.perplexity_golden,
            one.perplexity_shards,
            other.perplexity_shards,
            one.mean_kl,
            other.mean_kl,
            one.top1_agreement,
            other.top1_agreement,
        )
        for one, other in zip(exact, engine, strict=True)
    )
