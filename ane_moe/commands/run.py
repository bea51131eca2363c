"""`ane-moe run`: execute one function of a package."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson, InputFiles, Package, PrecisionName, RuntimeName

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from ane_moe.runtime.reference.tracing import Traced


def run(
    package: Package,
    given: InputFiles = None,
    function: Annotated[
        str | None, typer.Option(help="The function to run.", show_default="the default one")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the outputs, one .npy each; labels in labels.json."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draw the inputs that are not given from this seed.")
    ] = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help=(
                "Keep every intermediate (trace.npz in --output) and report its numbers; with "
                "coreai those that Core AI shows."
            ),
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run one function once, its state fresh, and show or save what it gives."""
    from rich.console import Console
    from rich.text import Text

    from ane_moe.errors import UserError
    from ane_moe.mlprogram.printer import printable
    from ane_moe.runtime import load_package, resolve_runtime, with_precision
    from ane_moe.runtime.arrays import (
        labels_of,
        numbers_of,
        random_inputs,
        read_inputs,
        save_archive,
        save_arrays,
        save_labels,
    )

    resolved = resolve_runtime(runtime, package)
    if trace and resolved == "coreml":
        if runtime != "auto":
            raise UserError("Core ML shows no intermediates", resolved, "leave --trace out")
        runtime = "reference"
    chosen, options = with_precision(runtime, precision, package)
    loaded: Any = load_package(package, function, chosen, **options)
    inputs = read_inputs(given or [])
    if seed is not None:
        inputs = (
            random_inputs([one for one in loaded.inputs if one.name not in inputs], seed) | inputs
        )
    state = loaded.make_state() if loaded.states else None
    traced: tuple[Traced, ...] = ()
    if trace:
        from ane_moe.runtime.reference.tracing import trace as run_traced

        whole = run_traced(loaded, inputs, state)
        results, traced = whole.results, whole.values
    else:
        results = loaded.predict(inputs, state)
    numbers, labels = numbers_of(results), labels_of(results)
    if output is not None:
        save_arrays(output, numbers)
        if labels:
            save_labels(output, labels)
        if trace:
            save_archive(output / "trace.npz", {value.name: value.value for value in traced})
    if as_json:
        document = _document(numbers, traced) | ({"labels": labels} if labels else {})
        typer.echo(json.dumps(document, indent=2))
        return
    console = Console()
    if traced:
        console.print(_trace_table(traced))
    console.print(_output_table(numbers))
    for name, label in labels.items():
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
