"""Everything the report page shows, gathered from a conversion and from what was found out about
it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.forecast.chips import chip_names, find_chip
from ane_moe.forecast.core_ai import of_conversion
from ane_moe.forecast.cost_model import predict
from ane_moe.forecast.workload import workload_of
from ane_moe.formats.recipe import recipe_of
from ane_moe.manifest import Manifest, read_manifest
from ane_moe.original.golden import read_golden
from ane_moe.origins import shown
from ane_moe.package_form import PACKAGE
from ane_moe.placement.result import PlacementReport
from ane_moe.routing.routing_trace import read_trace
from ane_moe.routing.statistics import relative_entropy, summarise
from ane_moe.verification.result import VerifyReport

MAX_BENCH_BYTES = 1 << 24


@dataclass(frozen=True)
class ExpertUse:
    """Share of a layer's choices that each expert got, and their entropy over that of even use."""

    layer: int
    usage: tuple[float, ...]
    entropy: float


@dataclass(frozen=True)
class ReportData:
    """Parts that are not there are None (or empty), and the page leaves them out.

    `bench` is a document that `bench --save` wrote; `predicted` one of the cost model
    (`Prediction.as_json`), in whose place `core_ai` stands for Core AI's assets: sentences.
    `routing_of` says what text the experts' use was counted on.
    """

    folder: str
    manifest: Manifest
    verify: VerifyReport | None
    placement: PlacementReport | None
    bench: dict[str, Any] | None
    predicted: dict[str, Any] | None
    routing: tuple[ExpertUse, ...]
    routing_of: str
    core_ai: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether every gate that was tried passed; None when none was."""
        tried = [part.passed for part in (self.verify, self.placement) if part is not None]
        return all(tried) if tried else None


def gather(
    out: Path,
    *,
    verify: VerifyReport | None = None,
    placement: PlacementReport | None = None,
    bench: Path | None = None,
    trace: Path | None = None,
    target: str = "m4-max",
) -> ReportData:
    """Read what lies beside the shards in `out` and join it with results that the caller has.

    Raises UserError for a folder that is no conversion, and for a bench file or a trace that cannot
    be read.
    """
    manifest = read_manifest(out)
    routing, source = _expert_use(out, manifest, trace)
    known = target in chip_names() and manifest.package_form == PACKAGE  # of Core ML
    predicted = predict(workload_of(out), find_chip(target)).as_json() if known else None
    figures = _bench(bench) if bench else None
    told: tuple[str, ...] = ()
    if manifest.package_form != PACKAGE:
        told = of_conversion(recipe_of(manifest.weights, manifest.recipe).formats)
    return ReportData(
        shown(out), manifest, verify, placement, figures, predicted, routing, source, told
    )


def _expert_use(
    out: Path, manifest: Manifest, trace: Path | None
) -> tuple[tuple[ExpertUse, ...], str]:
    if trace is not None:
        summary = summarise(read_trace(trace))
        return tuple(
            ExpertUse(one.layer, one.usage, one.entropy) for one in summary.layers
        ), f"{summary.tokens} tokens"
    if manifest.golden is None:
        return (), ""
    golden = read_golden(out / manifest.golden)
    found = []
    for index in manifest.layers:
        layer = golden.layers[index]
        if layer.router_probs is not None and layer.router_indices is not None:
            found.append(_use(index, layer.router_indices, layer.router_probs.shape[1]))
    return tuple(found), f"the golden's {sum(map(len, golden.prompts))} tokens"


def _use(layer: int, chosen: np.ndarray, experts: int) -> ExpertUse:
    usage = np.bincount(chosen.reshape(-1), minlength=experts) / chosen.size
    return ExpertUse(layer, tuple(usage.tolist()), relative_entropy(usage))


def _bench(path: Path) -> dict[str, Any]:
    """A bench document. What the page reads of it is checked; the rest is shown to nobody."""
    try:
        if path.stat().st_size > MAX_BENCH_BYTES:
            raise UserError(
                f"{path} is too large for a saved bench", f"{path.stat().st_size} bytes"
            )
        document = json.loads(path.read_text(encoding="utf-8"))
        for row in (*document["decode"], *document.get("windows", ())):
            _require_numbers(
                row["latency"]["median_ms"], row["tok_s"], row["host_ms"], *row["kinds_ms"].values()
            )
        _require_text(
            *(document["conditions"][name] for name in ("label", "chip", "os", "started"))
        )
        if not isinstance(document["device_figures"], bool):
            raise ValueError("device_figures is not true or false")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a saved bench",
            f"{type(error).__name__}: {error}",
            "make one with `ane-moe bench OUT --save FILE`",
        ) from None
    return dict(document)


def _require_numbers(*values: Any) -> None:
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError("a time is not a number")


def _require_text(*values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError("a condition is not text")
