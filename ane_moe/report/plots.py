"""Plots as SVG text that takes its text colour from the page, so that it can be read on light and
dark alike."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ane_moe.report.report_data import ExpertUse
from ane_moe.routing.cache_study import CacheRow, CacheStudy
from ane_moe.verification.result import ShardResult

INK = "#010203"  # stands for the page's own colour, and is replaced by it
BLUE, ORANGE, GREEN, GREY = "#3d7dd8", "#d9822b", "#3c9a5f", "#8a8f98"
COLOURS = (INK, BLUE, ORANGE, GREEN, GREY, "#9b59b6", "#16a085")
WIDE = 7.2  # inches


def parity_plot(rows: Sequence[ShardResult], title: str) -> str:
    """1 - cosine of every function by layer, on a logarithmic scale, with the gate."""
    figure, axes = _figure(2.6)
    kinds = list(dict.fromkeys(row.kind for row in rows if row.layer is not None))
    for kind, colour in zip(kinds, (BLUE, ORANGE, GREEN, GREY, BLUE), strict=False):
        mine = [
            row
            for row in rows
            if row.kind == kind and row.layer is not None and row.cosine is not None
        ]
        errors = [max(1 - (row.cosine or 0.0), 1e-8) for row in mine]
        axes.scatter(
            [row.layer or 0 for row in mine], errors, s=22, color=colour, label=kind, alpha=0.8
        )
    limits = [1 - row.min_cosine for row in rows]
    axes.axhline(max(limits), color="#c0392b", linestyle="--", linewidth=1, label="gate")
    axes.set(yscale="log", xlabel="layer", ylabel="1 - cosine (lower is better)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=4, labelcolor=INK, fontsize=8)
    return _svg(figure, "parity")


def routing_plot(layers: Sequence[ExpertUse]) -> str:
    """Heat map, layer by expert: times the share of even use."""
    experts = max(len(layer.usage) for layer in layers)
    grid = np.full((len(layers), experts), np.nan)
    for place, layer in enumerate(layers):
        grid[place, : len(layer.usage)] = np.array(layer.usage) * len(layer.usage)
    figure, axes = _figure(min(6.0, 1.3 + 0.16 * len(layers)))
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer.layer) for layer in layers[::step]])
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("times even use", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8)
    return _svg(figure, "routing")


def latency_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the ms of a decoded token go, stacked, by tokens of context."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds_ms"]))
    figure, axes = _figure(0.9 + 0.4 * len(rows))
    left = np.zeros(len(rows))
    for kind, colour in zip(
        [*kinds, "host"], (BLUE, ORANGE, GREEN, GREY, "#9b59b6", "#16a085"), strict=False
    ):
        values = np.array(
            [row["host_ms"] if kind == "host" else row["kinds_ms"].get(kind, 0.0) for row in rows]
        )
        axes.barh(range(len(rows)), values, left=left, color=colour, label=kind, height=0.6)
        left += values
    axes.set_yticks(range(len(rows)), [f"{row['fill']} tokens" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms a token", ylabel="context")
    axes.legend(
        frameon=False, ncols=5, labelcolor=INK, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1)
    )
    return _svg(figure, "latency")


def cache_plot(study: CacheStudy) -> str:
    """Hits by capacity: of each policy (lines), and of guesses loaded ahead (dashes)."""
    figure, axes = _figure(3.2)
    series: dict[tuple[str, str], list[CacheRow]] = {}
    for row in study.rows:
        series.setdefault((row.policy, row.predictor), []).append(row)
    alone = [key for key in series if key[1] == "none"]
    ahead = [key for key in series if key[1] != "none"]
    for keys, line in ((alone, "-"), (ahead, "--")):
        for key, colour in zip(keys, COLOURS, strict=False):
            rows = series[key]
            axes.plot(
                [100 * row.share for row in rows],
                [100 * row.hit_rate for row in rows],
                line,
                color=colour,
                label=key[0] if line == "-" else f"{key[0]}, ahead by {key[1]}",
                linewidth=1.4,
                marker="o",
                markersize=3,
            )
    axes.set(xlabel="cache, % of all experts", ylabel="hits, %", ylim=(0, 100))
    axes.legend(frameon=False, ncols=2, labelcolor=INK, fontsize=7, loc="lower right")
    return _svg(figure, "cache")


def prediction_plot(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Predicted ms a token by what they go to: expected as bars, low to high as lines."""
    names = [name for name, values in parts.items() if values["high"] > 0]
    figure, axes = _figure(0.9 + 0.3 * len(names))
    expected = np.array([parts[name]["expected"] for name in names])
    below = expected - [parts[name]["low"] for name in names]
    above = np.array([parts[name]["high"] for name in names]) - expected
    axes.barh(
        range(len(names)),
        expected,
        xerr=np.abs([below, above]),
        height=0.55,
        color="none",
        edgecolor=BLUE,
        hatch="///",
        ecolor=INK,
        capsize=3,
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="ms a token, predicted: low, expected, high")
    return _svg(figure, "prediction")


def bytes_plot(roles: Mapping[str, Mapping[str, Any]]) -> str:
    """MB by role, as stored and as fp16."""
    names = sorted(roles)
    figure, axes = _figure(0.9 + 0.32 * len(names))
    plain = [2 * roles[name]["weights"] / 1e6 for name in names]
    stored = [roles[name]["bytes"] / 1e6 for name in names]
    axes.barh(names, plain, height=0.7, color="none", edgecolor=GREY, label="fp16")
    axes.barh(names, stored, height=0.7, color=BLUE, label="stored")
    axes.invert_yaxis()
    axes.set(xlabel="MB")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, "bytes")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set(color=INK, size=9)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of an HTML page: no header, no fixed size, ids of its own."""
    stream = io.StringIO()
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "svg.id": f"plot-{name}",
    }
    with matplotlib.rc_context(settings):
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
