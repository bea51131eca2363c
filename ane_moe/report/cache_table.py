"""Cache studies, and adapters, for the terminal."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ane_moe.routing.alignment import Alignment
from ane_moe.routing.cache_study import CacheRow, CacheStudy

MB = 1_000_000
COLUMNS = (
    "capacity",
    "MB",
    "hits",
    "of belady",
    "late",
    "MB loaded",
    "of it unused",
    "stalled ms",
    "ms",
)


def cache_table(study: CacheStudy) -> RenderableType:
    """By policy without guesses, and by predictor."""
    machine = study.machine
    head = Text(
        f"{study.family}, {study.source}: {study.tokens} tokens, {study.layers} layers, experts of "
        f"{study.expert_bytes / MB:,.1f} MB, of whose functions {study.compulsory} are called"
    )
    foot = Text(
        f"Bytes and times a token. Times are PREDICTED, for {machine.compute_ms:g} ms a layer, "
        f"{machine.readers} reads at once of {machine.read_gb_s:g} GB/s after "
        f"{machine.latency_ms:g} ms, contention {machine.contention:g}.",
        style="dim",
    )
    alone = [row for row in study.rows if row.predictor == "none"]
    ahead = [row for row in study.rows if row.predictor != "none"]
    tables = [_table("Who leaves first", "policy", ((row.policy, row) for row in alone))]
    if ahead:
        title = f"What is loaded ahead, by guesses a layer before ({ahead[0].policy})"
        tables.append(_table(title, "predictor", ((row.predictor, row) for row in ahead)))
    return Group(head, *tables, foot)


def alignment_table(found: Alignment) -> RenderableType:
    """Recall by predictor and distance, and what becomes of hidden states."""
    head = Text(
        f"rank {found.rank}, fitted on {found.tokens_fitted} tokens; on the "
        f"{found.tokens_left_out} left out:"
    )
    recalls = Table(title="Experts named", title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(("predictor", "layers ahead", "by k guesses", "by 2k")):
        recalls.add_column(column, justify="right" if number else "left")
    for (name, far), (at_k, at_2k) in found.means.items():
        recalls.add_row(name, str(far), f"{at_k:.1%}", f"{at_2k:.1%}")
    exits = Table(
        title="Hidden states beside the last layer's (cosine)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for number, column in enumerate(("after layer", "as they are", "adapted")):
        exits.add_column(column, justify="right" if number else "left")
    for layer, (plain, adapted) in found.exits.items():
        exits.add_row(str(layer), f"{plain:.3f}", f"{adapted:.3f}")
    return Group(head, *([recalls] if found.recalls else []), exits)


def _table(title: str, first: str, rows: Iterable[tuple[str, CacheRow]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, row in rows:
        calls = max(1, row.hits + row.late + row.misses)
        table.add_row(
            name,
            f"{row.share:.1%}",
            f"{row.cache_bytes / MB:,.1f}",
            f"{row.hit_rate:.1%}",
            "-" if row.of_belady is None else f"{row.of_belady:.3f}",
            f"{row.late / calls:.1%}",
            f"{row.bytes_loaded_per_token / MB:.3f}",
            f"{row.bytes_unused_per_token / MB:.3f}",
            f"{row.stalled_ms_per_token:.2f}",
            f"{row.ms_per_token:.2f}",
        )
    return table
