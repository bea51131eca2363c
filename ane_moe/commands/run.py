"""`ane-moe run`: execute one function of a package."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson, InputFiles, Package, PrecisionName, RuntimeName

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from ane_moe.runtime.reference.tracing import Traced

FunctionName = Annotated[
    str | None, typer.Option(help="The function to run.", show_default="the default one")
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for the outputs, one .npy each; labels in labels.json."),
]
Seed = Annotated[
    int | None, typer.Option(help="Draw the inputs that are not given from this seed.")
]
Tracing = Annotated[
    bool,
    typer.Option(
        "--trace",
        help=(
            "Keep every intermediate (trace.npz in --output) and report its numbers; with "
            "coreai those that Core AI shows."
        ),
    ),
]


def run(
    package: Package,
    given: InputFiles = None,
    function: FunctionName = None,
    output: OutputFolder = None,
    seed: Seed = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    trace: Tracing = False,
    as_json: AsJson = False,
) -> None:
    """Run one function once, its state fresh, and show or save what it gives."""
    from ane_moe.runtime import load_package, with_precision
    from ane_moe.runtime.arrays import random_inputs, read_inputs

    runtime = _showing_intermediates(runtime, package) if trace else runtime
    chosen, options = with_precision(runtime, precision, package)
    loaded: Any = load_package(package, function, chosen, **options)
    inputs = read_inputs(given or [])
    if seed is not None:
        drawn = [one for one in loaded.inputs if one.name not in inputs]
        inputs = random_inputs(drawn, seed) | inputs
    results = _called(loaded, inputs, trace)
    if output is not None:
        _save(results, output)
    _show(results, as_json)


@dataclass(frozen=True)
class Results:
    """What a function gave, and every intermediate where these were asked for (`traced`)."""

    numbers: "dict[str, np.ndarray]"
    labels: dict[str, Any]
    traced: "tuple[Traced, ...] | None"


def _showing_intermediates(runtime: str, package: Path) -> str:
    """A runtime that does: the reference runtime in place of Core ML, where either will do. Raises
    UserError."""
    from ane_moe.errors import UserError
    from ane_moe.runtime import resolve_runtime

    resolved = resolve_runtime(runtime, package)
    if resolved != "coreml":
        return runtime
    if runtime != "auto":
        raise UserError("Core ML shows no intermediates", resolved, "leave --trace out")
    return "reference"


def _called(loaded: Any, inputs: "dict[str, np.ndarray]", traced: bool) -> Results:
    """One call, its state fresh."""
    from ane_moe.runtime.arrays import labels_of, numbers_of

    state = loaded.make_state() if loaded.states else None
    if not traced:
        results = loaded.predict(inputs, state)
        return Results(numbers_of(results), labels_of(results), None)
    from ane_moe.runtime.reference.tracing import trace

    whole = trace(loaded, inputs, state)
    return Results(numbers_of(whole.results), labels_of(whole.results), whole.values)


def _save(results: Results, folder: Path) -> None:
    from ane_moe.runtime.arrays import save_archive, save_arrays, save_labels

    save_arrays(folder, results.numbers)
    if results.labels:
        save_labels(folder, results.labels)
    if results.traced is not None:
        save_archive(folder / "trace.npz", {one.name: one.value for one in results.traced})


def _show(results: Results, as_json: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from ane_moe.mlprogram.printer import printable

    if as_json:
        labels = {"labels": results.labels} if results.labels else {}
        document = _document(results.numbers, results.traced or ()) | labels
        typer.echo(json.dumps(document, indent=2))
        return
    console = Console()
    if results.traced:
        console.print(_trace_table(results.traced))
    console.print(_output_table(results.numbers))
    for name, label in results.labels.items():
        if not isinstance(label, dict):
            console.print(Text(printable(f"{name}: {label}")))


def _document(results: "dict[str, np.ndarray]", traced: "tuple[Traced, ...]") -> dict[str, Any]:
    from ane_moe.runtime.reference.tracing import describe

    def row(value: "Traced") -> dict[str, Any]:
        return {
            "op": value.op,
            "name": value.name,
            "dtype": str(value.value.dtype),
            "shape": list(value.value.shape),
            "largest": value.largest,
            "nan": value.nan,
            "inf": value.inf,
        }

    outputs = [row(describe("output", name, value)) for name, value in results.items()]
    return {"outputs": outputs} | ({"trace": [row(value) for value in traced]} if traced else {})


def _output_table(results: "dict[str, np.ndarray]") -> "Table":
    from ane_moe.runtime.reference.tracing import describe

    return _trace_table(tuple(describe("output", name, value) for name, value in results.items()))


def _trace_table(values: "tuple[Traced, ...]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from ane_moe.mlprogram.printer import printable

    table = Table(box=None, pad_edge=False)
    for column in ("op", "name", "type", "shape"):
        table.add_column(column, overflow="fold")
    for column in ("largest", "NaN", "Inf"):
        table.add_column(column, justify="right")
    for value in values:
        cells = (
            value.op,
            value.name,
            str(value.value.dtype),
            " x ".join(map(str, value.value.shape)) or "scalar",
            f"{value.largest:.4g}",
            str(value.nan or ""),
            str(value.inf or ""),
        )
        table.add_row(
            *(Text(printable(cell)) for cell in cells),
            style="bold red" if value.nan or value.inf else None,
        )
    return table
