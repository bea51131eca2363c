"""`ane-moe diff`: the first op where two programs part."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson, InputFiles, opened_package

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ane_moe.runtime.reference.diff import Diff, Difference, Unmatched

SHOWN = 10  # operations that only one side has, listed at most

ProgramA = Annotated[
    Path,
    typer.Argument(
        help="An .mlpackage, .mlmodelc or .aimodel folder, or the address of one.",
        metavar="A",
        callback=opened_package,
    ),
]
ProgramB = Annotated[
    Path | None,
    typer.Argument(
        help=(
            "Another one; left out, A is compared with itself under the other runtime or precision."
        ),
        metavar="B",
        callback=opened_package,
        show_default=False,
    ),
]
Function = Annotated[
    str | None, typer.Option(help="The function of both.", show_default="the default one")
]
FunctionB = Annotated[
    str | None, typer.Option(help="The function of B.", show_default="as --function")
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help="Runtime of A: reference, coreml, coreai or auto.",
        show_default="reference; coreai for an .aimodel",
    ),
]
RuntimeB = Annotated[
    str | None,
    typer.Option(help="Runtime of B.", show_default="as --runtime; coreai for an .aimodel"),
]
Precision = Annotated[
    str, typer.Option(help="Precision of A in the reference runtime: fp32, fp16 or engine.")
]
PrecisionB = Annotated[
    str | None,
    typer.Option(help="Precision of B.", show_default="as --precision; fp32 for an .aimodel"),
]
Seed = Annotated[int, typer.Option(help="Draws the inputs that are not given.")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Relative L2 beyond which two values have parted.",
        show_default="0.01; of two runtimes 0.05, and gaps up to 2^-14 are none",
    ),
]


def diff(
    a: ProgramA,
    b: ProgramB = None,
    given: InputFiles = None,
    function: Function = None,
    function_b: FunctionB = None,
    runtime: Runtime = None,
    runtime_b: RuntimeB = None,
    precision: Precision = "fp32",
    precision_b: PrecisionB = None,
    seed: Seed = 0,
    tolerance: Tolerance = None,
    as_json: AsJson = False,
) -> None:
    """Run both on the same inputs and show the first op where they part, and by how much.

    Ops are matched in order, by type and shape; among equal ones names choose. Of an .aimodel, and
    of what runs in the coreai runtime, Core AI's intermediate logger shows them; how many it does
    not show is said. Exits with 1 when something differs by more than the tolerance.
    """
    from ane_moe.package_form import ASSET
    from ane_moe.runtime import with_precision
    from ane_moe.runtime.arrays import read_inputs
    from ane_moe.runtime.reference.diff import Side
    from ane_moe.runtime.reference.diff import diff as compare

    def side(path: Path, name: str | None, asked: str | None, rounding: str) -> Side:
        chosen = asked or ("auto" if path.suffix == ASSET else "reference")
        resolved, options = with_precision(chosen, rounding, path)
        return Side(path, resolved, name, options)

    other = b or a
    is_asset = other.suffix == ASSET
    of_a, as_a = (None, "fp32") if is_asset else (runtime, precision)
    result = compare(
        side(a, function, runtime, precision),
        side(other, function_b or function, runtime_b or of_a, precision_b or as_a),
        read_inputs(given or []),
        seed,
        tolerance,
    )
    if as_json:
        typer.echo(json.dumps(_document(result), indent=2))
    else:
        for line in _lines(result):
            typer.echo(line)
    if not result.same:
        raise typer.Exit(1)


def _document(result: "Diff") -> dict[str, Any]:
    """JSON has no infinity: a pair that cannot be compared has null differences."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    place = result.parts_at
    return {
        "same": result.same,
        "parts_at": finite(asdict(place)) if place else None,
        **finite(asdict(result)),
    }


def _lines(result: "Diff") -> "Iterator[str]":
    from ane_moe.mlprogram.printer import printable

    only_a = _left_out(result, "A", result.unmatched_a)
    only_b = _left_out(result, "B", result.unmatched_b)
    beyond = f", gaps beyond {result.least_gap:.2g}" if result.least_gap else ""
    yield printable(
        f"{result.compared} intermediates compared, {only_a}, {only_b}; "
        f"tolerance {result.tolerance:g}{beyond}"
    )
    for side, why in result.blind.items():
        yield printable(f"of {side} the outputs alone are seen: {why}")
    place = result.parts_at
    if place is not None and place is not result.first:
        yield f"first apart: {_only(result.only[0])}"
        if result.first is not None:
            yield f"then apart: {_pair(result.first)}"
    elif result.first is not None:
        yield f"first apart: {_pair(result.first)}"
    elif result.worst is not None:
        apart = "none apart" if result.same else "only the outputs are apart"
        yield f"{apart}; worst: {_pair(result.worst)}"
    others = [
        item
        for item in result.only
        if item is not place and _other(item.side) not in result.in_part
    ]
    yield from (_only(item) for item in others[:SHOWN])
    if len(others) > SHOWN:
        yield f"and {len(others) - SHOWN} more that only one side has"
    for pair in result.outputs:
        yield f"output: {_pair(pair)}"


def _other(side: str) -> str:
    return "B" if side == "A" else "A"


def _left_out(result: "Diff", side: str, count: int) -> str:
    """A program may well have what Core AI does not show of it."""
    if _other(side) not in result.in_part or not count:
        return f"{count} only in {side}"
    types = Counter(item.op for item in result.only if item.side == side)
    listed = ", ".join(f"{number} {op}" for op, number in types.most_common())
    return f"{count} of {side} not shown by Core AI in {_other(side)} ({listed})"


def _only(item: "Unmatched") -> str:
    from ane_moe.mlprogram.printer import printable

    place = f"after {item.after}" if item.after else "before all that both have"
    return printable(f"{item.op} {item.name} {list(item.shape)}: only in {item.side}, {place}")


def _pair(pair: "Difference") -> str:
    from ane_moe.mlprogram.printer import printable

    names = pair.name_a if pair.name_a == pair.name_b else f"{pair.name_a} / {pair.name_b}"
    if pair.shape_a != pair.shape_b:
        return printable(f"{pair.op} {names}: shapes {list(pair.shape_a)} and {list(pair.shape_b)}")
    return printable(f"{pair.op} {names}: relative {pair.relative:.3g}, largest {pair.largest:.3g}")
