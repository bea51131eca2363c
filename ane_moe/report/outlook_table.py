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
    table = Table("routing", "weights", "MB", "memory GB", "shards", "calls/token", "MB/token", "tok/s", "bound by",
                  "convert", "", box=None)  # fmt: skip
    for column in table.columns[2:8]:
        column.justify = "right"
    marks = _marks(found)
    for choice in found.choices:
        table.add_row(*_cells(choice, marks))
    console.print(table)
    _print(console, f"tok/s of decoding, memory and convert times are low-expected-high: {NOTE}. MB of 1e6 bytes.")
    for key, mark in marks.items():
        _print(console, f"{mark} {_concern(found, *key)}")
    for note in found.notes:
        _print(console, f"note: {note}")
    _print(console, "soft routing costs what masked costs, and is another function than the model's.")
    _print(console, found.recommendation)


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


def _cells(choice: Choice, marks: dict[tuple[str, str], str]) -> tuple[str, ...]:
    work, predicted = choice.workload, choice.prediction
    memory = predicted.memory_bytes
    return (
        choice.routing,
        choice.recipe,
        f"{work.disk_bytes / 1e6:,.0f}",
        f"{memory.low / 1e9:.1f}-{memory.expected / 1e9:.1f}-{memory.high / 1e9:.1f}",
        f"{work.packages}",
        f"{work.calls_per_token.expected:.0f}",
        f"{work.weight_bytes_per_token.expected / 1e6:,.0f}",
        _range(predicted.decode.tok_s),
        predicted.bound,
        _duration(choice.conversion_seconds),
        " ".join(marks[c.kind, c.rule] for c in choice.concerns),
    )


def _range(value: Range) -> str:
    return "-".join(f"{end:.3g}" for end in (value.low, value.expected, value.high))


def _duration(seconds: Range | None) -> str:
    if seconds is None:
        return "not timed"
    ends = (seconds.low, seconds.expected, seconds.high)
    if seconds.high < 2 * MINUTE:
        return "-".join(f"{end:.0f}" for end in ends) + " s"
    return "-".join(f"{end / MINUTE:.0f}" for end in ends) + " min"
