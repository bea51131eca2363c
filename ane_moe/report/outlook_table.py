"""The outlook of `ane-moe plan` on the terminal."""

from rich.console import Console
from rich.table import Table

from ane_moe.benchmark.chips import Range
from ane_moe.benchmark.cost_model import NOTE
from ane_moe.outlook import Choice, Outlook

MINUTE = 60


def print_outlook(found: Outlook) -> None:
    """The table, what it rests on, and the recommendation."""
    console = Console()
    size = f"{found.weights / 1e9:.2f} billion weights in shards"
    _print(console, f"{found.model_type}, {size}, context {found.context}, on {found.target}")
    marks = _marks(found)
    sizes = _table("MB", "shards", "calls/token", "MB/token", "convert", "see")
    speeds = _table("tok/s", "prefill tok/s", "memory GB", "load s", "bound by")
    for choice in found.choices:
        sizes.add_row(choice.routing, choice.recipe, *_size_cells(choice, marks))
        speeds.add_row(choice.routing, choice.recipe, *_speed_cells(choice))
    console.print(sizes)
    _print(console, f"\nPredicted, low-expected-high ({NOTE}):")
    console.print(speeds)
    _print(console, "\nMB are of 1e6 bytes; convert times are estimates from a Linux machine.")
    for key, mark in marks.items():
        _print(console, f"{mark} {_concern(found, *key)}")
    for note in found.notes:
        _print(console, f"note: {note}")
    _print(console, "soft routing costs what masked costs, and is another function than the model's.")
    _print(console, found.recommendation)


def _table(*columns: str) -> Table:
    """Cells are never cut or wrapped: a range without one of its ends would say something else."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("routing", "weights", *columns):
        table.add_column(name, no_wrap=True, overflow="ignore")
    return table


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _marks(found: Outlook) -> dict[tuple[str, str], str]:
    """A letter for each kind and rule that any choice meets."""
    met = dict.fromkeys((c.kind, c.rule) for choice in found.choices for c in choice.concerns)
    return {key: chr(ord("a") + number) for number, key in enumerate(met)}


def _concern(found: Outlook, kind: str, rule: str) -> str:
    same = [c for choice in found.choices for c in choice.concerns if (c.kind, c.rule) == (kind, rule)]
    sizes = sorted({f"{c.function_bytes / 1e6:.1f}" for c in same}, key=float)
    state = "off the engine" if same[0].verdict == "cpu" else "undecided"
    return f"{state}: {kind} of {', '.join(sizes)} MB: {same[0].reason} ({rule})"


def _size_cells(choice: Choice, marks: dict[tuple[str, str], str]) -> tuple[str, ...]:
    work = choice.workload
    return (
        f"{work.disk_bytes / 1e6:,.0f}",
        f"{work.packages}",
        f"{work.calls_per_token.expected:.0f}",
        f"{work.weight_bytes_per_token.expected / 1e6:,.0f}",
        _duration(choice.conversion_seconds),
        " ".join(marks[c.kind, c.rule] for c in choice.concerns),
    )


def _speed_cells(choice: Choice) -> tuple[str, ...]:
    predicted = choice.prediction
    return (
        _range(predicted.decode.tok_s),
        _range(predicted.prefill.tok_s),
        _range(predicted.memory_bytes, 1e9),
        _range(predicted.load_seconds),
        predicted.bound,
    )


def _range(value: Range, unit: float = 1) -> str:
    ends = (end / unit for end in (value.low, value.expected, value.high))
    return "-".join(f"{end:,.0f}" if end >= 99.5 else f"{end:.2g}" for end in ends)


def _duration(seconds: Range | None) -> str:
    if seconds is None:
        return "not timed"
    ends = (seconds.low, seconds.expected, seconds.high)
    if seconds.high < 2 * MINUTE:
        return "-".join(f"{end:.0f}" for end in ends) + " s"
    return "-".join(f"{end / MINUTE:.0f}" for end in ends) + " min"
