"""The outlook of `ane-moe plan` on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ane_moe.forecast.chips import Range, find_chip
from ane_moe.forecast.cost_model import NOTE
from ane_moe.forecast.design import Design
from ane_moe.forecast.outlook import Choice, Outlook
from ane_moe.forecast.stream_fit import StreamFit
from ane_moe.forecast.track_forms import advice
from ane_moe.loop.ahead_rule import CONTENTION
from ane_moe.loop.expert_store import READERS

MINUTE = 60
UNBOUNDED = 10_000
# Units from the largest on; a column has one for all its rows.
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
DURATIONS = {"h": 3600.0, "min": 60.0} | SECONDS
SOFT = "soft routing costs what masked costs, and is another function than the model's."
GUESSED = (
    "With guesses: of attention shards a layer ahead, as right as --recall says, read one after "
    f"another; computing takes {1 + CONTENTION:g} times as long meanwhile (upper end: no longer)."
)
LEAST = 0.1  # of a unit that a column's smallest figure may be


def print_outlook(found: Outlook) -> None:
    """The verdict, or why convert does not take it; the tables, what they rest on, and the
    recommendation."""
    console = Console()
    if not found.supported:
        _print(console, f"not supported: {found.refusal}")
    if found.verdict:
        stream = [found.stream.sentence] if found.stream else []
        _print(console, "\n".join([found.verdict.sentence, *stream, ""]))
    if found.choices:
        _forecast(console, found)
    if found.design:
        smallest = "even a function of the fewest tokens" if found.lengths else "a decode function"
        _designed(console, found.design, smallest)
    if found.streams:
        _streams(console, found.streams)
    if found.synchronisations:
        _print(console, f"{found.synchronisations.sentence}.")
    if found.forms:
        _print(console, advice(found.forms, found.target))
    if found.lending:
        _print(console, found.lending.sentence)
    if found.early:
        _print(console, found.early.sentence)
    for note in found.notes:
        _print(console, f"note: {note}")
    if found.choices:
        _print(console, SOFT)
    _print(console, found.recommendation)


def _forecast(console: Console, found: Outlook) -> None:
    size = f"{_weights(found.weights or 0)} weights in shards"
    where = f"on {found.target} under OS {found.os}{'' if found.supported else ', approximate'}"
    calls = f"context {found.context}"
    if found.lengths:
        lengths = ", ".join(map(str, found.lengths))
        calls = f"windows of {lengths} tokens (figures: full ones of the most)"
    _print(console, f"{found.model_type}, {size}, {calls}, {where}")
    marks = _marks(found)
    sizes = _table("disk", "shards", "calls/token", "MB/token", "convert", "see")
    memory = _unit(BYTES, (choice.prediction.memory_bytes for choice in found.choices))
    load = _unit(SECONDS, (choice.prediction.load_seconds for choice in found.choices))
    first = _unit(DURATIONS, (choice.prediction.first_load_seconds for choice in found.choices))
    speeds = _table("tok/s", "prefill tok/s", f"memory {memory}", "bound by")
    loads = _table(f"first load {first}", f"load {load}", "tok/J")
    for choice in found.choices:
        sizes.add_row(choice.routing, choice.recipe, *_size_cells(choice, marks))
        speeds.add_row(choice.routing, choice.recipe, *_speed_cells(choice, BYTES[memory]))
        cells = _load_cells(choice, DURATIONS[first], SECONDS[load])
        loads.add_row(choice.routing, choice.recipe, *cells)
    _print_table(console, sizes)
    _print(console, f"\nPredicted, low-expected-high ({NOTE}):")
    _print_table(console, speeds)
    _print(console, "\nLoading and energy, predicted likewise; the first load compiles:")
    _print_table(console, loads)
    _print(
        console, "\ndisk is in MB (1e6 bytes); convert times are estimates from a Linux machine."
    )
    _print(console, f"tok/J: of the whole machine at {_watts(found.target)}")
    if share := found.choices[0].workload.tail_share:
        left_out = f"{share:.1%} of the layers' multiplications for a long prompt are left out"
        _print(console, f"{left_out}: its last token alone goes through all layers.")
    for key, mark in marks.items():
        _print(console, f"{mark} {_concern(found, *key)}")


def _streams(console: Console, streams: Sequence[StreamFit]) -> None:
    """What stays in memory with the experts in a store."""
    guessed = any(fit.speed and fit.speed.early_tok_s for fit in streams)
    table = _table_of(
        "weights",
        "resident MB",
        "expert kB",
        "most MB read/token",
        "experts in memory",
        "tok/s, predicted",
        *["with guesses"] * guessed,
    )
    refused = [fit for fit in streams if fit.budget is None]
    for fit in streams:
        if fit.budget is None or fit.speed is None:
            continue
        share = fit.budget.fitting / fit.budget.total
        table.add_row(
            fit.recipe,
            f"{fit.resident_bytes / 1e6:,.0f}",
            f"{fit.stored_expert_bytes / 1e3:,.0f}",
            f"{fit.most_read_bytes_per_token / 1e6:,.0f}",
            f"{fit.budget.fitting:,} of {fit.budget.total:,} ({share:.0%})",
            _range(fit.speed.tok_s),
            *([_range(fit.speed.early_tok_s)] if fit.speed.early_tok_s else []),
        )
    _print(console, "\nWith --routing stream, in the memory asked about:")
    if table.row_count:
        _print_table(console, table)
        speeds = {f"{fit.speed.read_gb_s:g} GB/s" for fit in streams if fit.speed}
        reads = f"a disk that reads {', '.join(speeds)}, {READERS} experts at once"
        _print(
            console,
            f"Predicted for {reads}, when they are called; where no --hit-rate is given, as many "
            "of those called are in memory as of all.",
        )
    if guessed:
        _print(console, GUESSED)
    for fit in refused:
        _print(console, f"{fit.recipe}: {fit.refusal}")


def _designed(console: Console, design: Design, smallest: str) -> None:
    """Each kind of function by its margin, and what to put together."""
    table = _table_of("function", "routing", "tokens", "margin ms", "Core ML's cost decision")
    rows = {(row.routing, row.kind, row.tokens, row.is_one_expert): row for row in design.functions}
    for row in rows.values():
        low, high = (f"{ms:+.2f}" for ms in row.margin_ms)
        kind = f"{row.kind}, 1 expert" if row.is_one_expert else row.kind
        margin = low if low == high else f"{low} to {high}"
        table.add_row(kind, row.routing, str(row.tokens), margin, row.verdict)
    _print(console, "\nEach function alone, predicted from Core ML's own estimates:")
    _print_table(console, table)
    _print(
        console,
        f"To be placed on the engine, {smallest} takes "
        f"--experts-per-function {design.experts_per_function} and "
        f"--layers-per-shard {design.layers_per_shard} (`auto` takes these).",
    )


def _table(*columns: str) -> Table:
    """Cells are never cut or wrapped: a range without one of its ends would say something else."""
    return _table_of("routing", "weights", *columns)


def _table_of(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ignore")
    return table


def _print_table(console: Console, table: Table) -> None:
    """At its full width, whatever the terminal's."""
    width = Measurement.get(console, console.options.update(max_width=UNBOUNDED), table).maximum
    console.width = max(width, console.width)  # no table is printed wider than that
    console.print(table, width=width, crop=False, no_wrap=True, overflow="ignore")


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _watts(chip: str) -> str:
    """Whose figure the power is."""
    value = find_chip(chip).values["decode_watts"]
    return f"{_range(value.range)} W, {value.confidence} ({value.source})"


def _marks(found: Outlook) -> dict[tuple[str, str], str]:
    """A letter for each kind and rule that any choice meets."""
    met = dict.fromkeys(concern.key for choice in found.choices for concern in choice.concerns)
    return {key: chr(ord("a") + number) for number, key in enumerate(met)}


def _concern(found: Outlook, kind: str, rule: str) -> str:
    same = [c for choice in found.choices for c in choice.concerns if c.key == (kind, rule)]
    sizes = sorted({c.function_bytes for c in same if c.function_bytes is not None})
    shown = dict.fromkeys(_short(size / 1e6) for size in (*sizes[:1], *sizes[-1:]))
    what = f"{kind} of {' to '.join(shown)} MB" if shown else kind
    tokens = sorted({count for concern in same for count in concern.tokens})
    called = f" (T={', '.join(map(str, tokens))})" if tokens else ""
    return f"{same[0].state}: {what}{called}: {same[0].sentence}"


def _size_cells(choice: Choice, marks: dict[tuple[str, str], str]) -> tuple[str, ...]:
    work = choice.workload
    return (
        _amount(work.disk_bytes / 1e6),
        f"{work.packages}",
        _calls(work.calls_per_token.expected),
        _amount(work.weight_bytes_per_token.expected / 1e6),
        _duration(choice.conversion_seconds),
        " ".join(marks[concern.key] for concern in choice.concerns),
    )


def _calls(each: float) -> str:
    return f"{each:.0f}" if each >= 1 else f"{each:.2g}"


def _speed_cells(choice: Choice, memory: float) -> tuple[str, ...]:
    predicted = choice.prediction
    return (
        _range(predicted.decode.tok_s),
        _range(predicted.prefill.tok_s),
        _range(predicted.memory_bytes, memory),
        predicted.bound,
    )


def _load_cells(choice: Choice, first: float, load: float) -> tuple[str, ...]:
    predicted = choice.prediction
    return (
        _range(predicted.first_load_seconds, first),
        _range(predicted.load_seconds, load),
        _range(predicted.tokens_per_joule),
    )


def _unit(units: dict[str, float], column: Iterable[Range]) -> str:
    """The largest unit in which the smallest figure of a column is not a small fraction."""
    smallest = min(value.low for value in column)
    return next((name for name, size in units.items() if smallest >= LEAST * size), list(units)[-1])


def _range(value: Range, unit: float = 1) -> str:
    return "-".join(_short(end / unit) for end in (value.low, value.expected, value.high))


def _short(value: float) -> str:
    """Two figures (three of a whole number), thousands as k and M: four characters from 0.1 on."""
    for suffix in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.0f}{suffix}" if value >= 99.5 else f"{value:.2g}{suffix}"
        value /= 1000
    return f"{value:,.0f}G"


def _weights(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def _duration(seconds: Range | None) -> str:
    if seconds is None:
        return "not timed"
    if seconds.high < 1:
        return f"{_range(seconds, 1e-3)} ms"
    ends = (seconds.low, seconds.expected, seconds.high)
    if seconds.high < 2 * MINUTE:
        return "-".join(f"{end:.0f}" for end in ends) + " s"
    return "-".join(f"{end / MINUTE:.0f}" for end in ends) + " min"
