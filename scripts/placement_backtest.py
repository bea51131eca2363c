"""Hold placement against what others published: print the tables of docs/placement.md, or put them
there, with the plot of margins.

    python scripts/placement_backtest.py [--write]

Exits with 1 when a prediction of `ane` or `cpu` is wrong.
"""

import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.placement.published.backtest import outcomes, table  # noqa: E402
from ane_moe.placement.published.dispatched import (  # noqa: E402
    Dispatched,
    dispatched_outcomes,
    dispatched_table,
)
from scripts.doc_page import DOCS, PagePart  # noqa: E402

PAGE = "placement.md"
PLOT = (DOCS / PAGE).with_suffix(".svg")
SHOWN_MS = 20.0
NOTHING_MS = -0.25  # the margin where the engine may run nothing: a run, and nothing saved
BESIDE = 0.12  # how far those on the CPU stand below those on the engine


def main() -> int:
    rows, graphs = outcomes(), dispatched_outcomes()
    texts = {"dispatch": dispatched_table(graphs), "back-test": table(rows)}
    if "--write" in sys.argv[1:]:
        for name, text in texts.items():
            PagePart(PAGE, name).write(text)
        plot(graphs)
    else:
        print("\n\n".join(texts.values()))
    return int(any(row.grade == "wrong" for row in [*rows, *graphs]))


def plot(graphs: list[Dispatched]) -> None:
    """Every graph by the predicted margin of its best stretch, coloured by where it was."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "placement"
    figure, axes = pyplot.subplots(figsize=(7.2, 2.8))
    for colour, name, on_engine in (("#3d7dd8", "engine", True), ("#d9822b", "CPU", False)):
        mine = [row for row in graphs if ("A" in row.graph.placed) == on_engine]
        best = [_best_margin_ms(row) for row in mine]
        sizes = [len(row.graph.placed) * (1 + BESIDE * on_engine) for row in mine]
        axes.scatter(best, sizes, s=14, color=colour, alpha=0.6, label=f"{len(mine)} on the {name}")
    axes.axvline(0, color="#8a8f98", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set(xlim=(-0.5, SHOWN_MS), xlabel="predicted margin of the best stretch, ms")
    axes.set(ylabel="operations", title="482 graphs, by where Core ML put them (M4, macOS 27.0.1)")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def _best_margin_ms(row: Dispatched) -> float:
    return max((stretch.margin_ms[1] for stretch in row.function.stretches), default=NOTHING_MS)


if __name__ == "__main__":
    sys.exit(main())
