"""`ane-moe plan`: what converting a model would give, from its config.json."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import AsJson, Context, PlacementSystem
from ane_moe.errors import UserError


def plan(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A model folder, a GGUF file, a config.json, a Hugging Face Hub id, `demo`, or a "
            "paper's model: pt-6b-d4 (tracks of 6b, 13b or 30b that meet every 2, 4 or 8 layers), "
            "mm1-3b, mm1-7b, afm-3b, omni-4x2-4x4-4x8 (groups of layers x experts that share a "
            "router).",
            metavar="CHECKPOINT",
        ),
    ],
    target: Annotated[
        str, typer.Option(help="The chip to predict for.", metavar="CHIP")
    ] = "m4-max",
    system: PlacementSystem = 26,
    compress: Annotated[
        str, typer.Option(help="Recipes or weight formats to compare.", metavar="LIST")
    ] = "fp16,int8,small,tiny",
    context: Context = None,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a prefill call; 0: decode functions only.", min=0)
    ] = 64,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="encoders: token counts of functions.", metavar="LIST", show_default="32,128,512"
        ),
    ] = None,
    max_shard_mb: Annotated[
        int, typer.Option(help="Split MoE layers into shards of at most this size.", min=1)
    ] = 220,
    memory_mb: Annotated[
        float | None,
        typer.Option(help="Also: how many experts of a store stay in so much memory.", min=1),
    ] = None,
    read_gb_s: Annotated[
        float | None,
        typer.Option(
            help="Assumed of streams: 10^9 bytes a second of the disk.",
            min=0.001,
            show_default="3.0",
        ),
    ] = None,
    hit_rate: Annotated[
        float | None,
        typer.Option(
            help="Assumed of streams: how many of the experts called are in memory.",
            min=0,
            max=1,
            show_default="as many as of all",
        ),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Assumed of streams: how many of a layer's experts attention shards guess a layer "
            "ahead (`align` says it for an adapter, `convert --early` builds them).",
            min=0,
            max=1,
            show_default="nothing is guessed",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a model fits, how fast it would be and which way to take; predict every way.

    Reads no weights. The first line is the answer; the tables are sizes, calls, speed, loading and
    placement of each way to convert.
    """
    from ane_moe.demo import built_in
    from ane_moe.forecast.outlook import outlook
    from ane_moe.forecast.stream_speed import READ_GB_S, Reading
    from ane_moe.number_lists import parse_counts
    from ane_moe.report.outlook_table import print_outlook

    streams = {"--read-gb-s": read_gb_s, "--hit-rate": hit_rate, "--recall": recall}
    idle = [name for name, value in streams.items() if value is not None]
    if idle and memory_mb is None:
        raise UserError(
            f"{idle[0]} is of experts that are read from a store",
            "no --memory-mb",
            "give --memory-mb, or leave it out",
        )
    recipes = tuple(name.strip() for name in compress.split(",") if name.strip())
    found = outlook(
        built_in(Path(checkpoint)),
        target=target,
        os=system,
        recipes=recipes,
        context=context,
        prefill=prefill,
        max_shard_mb=max_shard_mb,
        lengths=None if lengths is None else parse_counts(lengths, "--lengths", 1),
        memory_mb=memory_mb,
        reading=Reading(read_gb_s or READ_GB_S, hit_rate, recall),
    )
    if recall is not None and found.supported and found.early is None:
        what = f"experts of {found.model_type} are not guessed by shards"
        raise UserError(what, f"--recall {recall:g}", "leave it out")
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    print_outlook(found)
    if found.way:
        way = f"{found.way} --target {target} --golden"
        typer.echo(f"next: ane-moe convert {checkpoint} OUT {way}")
