"""`ane-moe cache-study`: which experts to keep in memory, and which to load ahead."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, TraceFile
from ane_moe.errors import UserError

Capacities = Annotated[str, typer.Option(help="Shares of all experts' bytes that the caches hold.")]
GuessPolicy = Annotated[str, typer.Option(help="Who leaves first where experts are loaded ahead.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of the trace to play.", min=1)]
ComputeMs = Annotated[
    float, typer.Option(help="Assumed: ms that a layer takes, nothing being waited for.")
]
ReadGbS = Annotated[float, typer.Option(help="Assumed: 10^9 bytes a second of one read.")]
LatencyMs = Annotated[float, typer.Option(help="Assumed: ms before a read begins.")]
Readers = Annotated[int, typer.Option(help="Assumed: reads at once.", min=1)]
Contention = Annotated[
    float,
    typer.Option(
        help="Assumed: computing takes 1 + this as long while experts load ahead (0.73 was "
        "measured of a GPU)."
    ),
]
Conversion = Annotated[
    Path | None,
    typer.Option(
        help="Guesses by hidden states too: run the trace's tokens through this conversion.",
        metavar="OUT",
        show_default=False,
    ),
]
Adapters = Annotated[
    Path | None,
    typer.Option(
        help="Of `ane-moe align`, for --conversion.", metavar="FILE.npz", show_default=False
    ),
]
Runtime = Annotated[str, typer.Option(help="For --conversion: reference, coreml or auto.")]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw hits by capacity.", metavar="FILE.svg", show_default=False),
]


def cache_study(
    trace: TraceFile,
    capacities: Capacities = "0.125,0.25,0.5,1",
    guess_policy: GuessPolicy = "layer-distance",
    max_tokens: MaxTokens = 2048,
    compute_ms: ComputeMs = 1.0,
    read_gb_s: ReadGbS = 3.0,
    latency_ms: LatencyMs = 0.1,
    readers: Readers = 4,
    contention: Contention = 0.0,
    conversion: Conversion = None,
    adapters: Adapters = None,
    runtime: Runtime = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Play a trace through caches of experts: hits, bytes and stalls by policy, capacity and
    predictor.

    Hits and bytes are those of `generate` on the same tokens; stalls are of a machine of assumed
    speeds. belady knows what is to come: no policy has more hits, and the others are compared with
    it.
    """
    from rich.console import Console

    from ane_moe.files import write_named_by_user
    from ane_moe.report.cache_table import cache_table
    from ane_moe.report.plots import cache_plot
    from ane_moe.report.step_bar import step_bar
    from ane_moe.routing.cache_study import Machine, study
    from ane_moe.routing.heard import hear
    from ane_moe.routing.routing_trace import read_trace

    machine = Machine(compute_ms, read_gb_s, latency_ms, readers, contention)
    recorded = read_trace(trace).first(max_tokens)
    if adapters and not conversion:
        raise UserError("adapters need hidden states", "--adapters", "give --conversion OUT too")
    with step_bar() as progress:
        heard = None
        if conversion:
            heard = hear(recorded, conversion, adapters, runtime=runtime, progress=progress)
        found = study(
            recorded,
            machine,
            shares=_shares(capacities),
            guess_policy=guess_policy,
            heard=heard,
            progress=progress,
        )
    if plot:
        write_named_by_user(plot, cache_plot(found))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        Console().print(cache_table(found), soft_wrap=True)


def _shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError("--capacities are shares of all experts", repr(text), "write 0.25,0.5,1")
    return shares
