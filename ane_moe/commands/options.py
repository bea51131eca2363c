"""Options and arguments that several commands have, so that they read and mean the same."""

from pathlib import Path
from typing import Annotated

import typer

from ane_moe.addresses import address, is_on_hub, local_path, output_path
from ane_moe.errors import UserError
from ane_moe.files import require_room, temporary_folder
from ane_moe.origins import note_origin


def opened_out(context: typer.Context, out: Path) -> Path:
    """The folder itself, or what is fetched of a conversion on the Hub or at an address: how every
    command opens its OUT. Raises UserError."""
    url = address(out)
    if context.resilient_parsing or not (url or is_on_hub(out)):
        return local_path(out)
    from ane_moe.hub.fetched import fetched
    from ane_moe.hub.pulled import pulled
    from ane_moe.report.step_bar import step_bar

    with step_bar() as progress:
        return pulled(str(out), progress) if url is None else fetched(url, progress)


def opened_package(context: typer.Context, package: Path | None) -> Path | None:
    """The package itself, or that of an address, fetched for this command. Raises UserError."""
    url = None if package is None else address(package)
    if context.resilient_parsing or package is None or url is None:
        return package and local_path(package)
    from ane_moe.package_form import MARKS
    from ane_moe.remote_folder import RemoteFolder

    there = RemoteFolder(url)
    if not any(there.has(name) for name in MARKS):
        raise UserError(f"{url} is no package", f"none of {', '.join(MARKS)} is there")
    scratch = context.with_resource(temporary_folder())
    here = scratch / package.name
    sizes = there.sizes()
    require_room(scratch, sum(sizes.values()), url)
    for name in sizes:
        there.fetch(name, here / name)
    note_origin(here, url)
    return here


def written_here(path: Path | None) -> Path | None:
    """What a command writes that writes on this machine alone. Raises UserError."""
    return path and output_path(path)


AdapterFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        help="A LoRA adapter (a folder of PEFT's) of the checkpoint; repeat for more.",
        metavar="FOLDER",
    ),
]
AdapterName = Annotated[
    str | None,
    typer.Option("--adapter", help="Switch on this adapter of the conversion.", metavar="NAME"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Beside = Annotated[
    bool,
    typer.Option(
        "--beside",
        help="Write a file beside each (notes.redacted.txt, notes.restored.txt) instead of stdout.",
    ),
]
Concurrency = Annotated[int, typer.Option(help="Experts of a layer, or tracks, to run at once.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens of the KV cache. [default: 2048, or the model's]")
]
ExpertCacheMb = Annotated[
    float | None,
    typer.Option(
        help="Keep at most this many MB (10^6 bytes) of expert functions loaded.",
        show_default="all",
    ),
]
Direct = Annotated[
    bool,
    typer.Option("--direct", help="stream: read experts around the system's page cache."),
]
ExpertPolicy = Annotated[
    str,
    typer.Option(help="Who leaves first: lru, lfu, layer-distance or least-stale."),
]
InputFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help="An input: its name and a .npy file. Repeatable.", metavar="NAME=FILE"
    ),
]
MemoryMb = Annotated[
    float | None,
    typer.Option(
        help=(
            "MB (10^6 bytes) that weights may take: what is left beyond the packages' own size "
            "goes to experts of a store and to expanded copies of what is used most (runtime "
            "reference)."
        ),
        show_default="the packages' size and half of what is free",
    ),
]
Out = Annotated[
    Path,
    typer.Argument(
        help="Folder of a conversion, its address, or hf://OWNER/NAME[@REVISION].",
        metavar="OUT",
        callback=opened_out,
        show_default=False,
    ),
]
Package = Annotated[
    Path,
    typer.Argument(
        help="An .mlpackage, .mlmodelc or .aimodel folder, or the address of one.",
        metavar="PACKAGE",
        callback=opened_package,
        show_default=False,
    ),
]
PlacementSystem = Annotated[
    int, typer.Option("--os", help="System to predict placement for: 15, 26 or 27.")
]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        help=(
            "Of the reference runtime: fp32 rounds once per op, fp16 inside reductions too, engine "
            "computes as the Neural Engine is known to (M4, M6)."
        ),
    ),
]
Predictor = Annotated[
    str,
    typer.Option(
        help=(
            "Load experts ahead, guessed by: none, static (most used), previous (token), layer "
            "(before), router (of the layer that is guessed), adapter (and an adapter), shard (as "
            "`convert --early` made it), auto (shard, where there are such)."
        ),
    ),
]
RuntimeName = Annotated[str, typer.Option(help="reference, coreml, coreai or auto.")]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]
Shards = Annotated[
    Path,
    typer.Argument(
        help="Folder of a conversion, its address, hf://OWNER/NAME[@REVISION], or `demo`: the "
        "built-in model.",
        metavar="OUT",
        callback=opened_out,
        show_default=False,
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TextFile = Annotated[
    Path | None,
    typer.Option(help="Take the text from this file, and from those that TEXT then names."),
]
TextOrFiles = Annotated[
    list[str] | None,
    typer.Argument(
        help="The text; after --file, more files.", metavar="[TEXT]", show_default="stdin"
    ),
]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to this.")]
TraceFile = Annotated[
    Path, typer.Argument(help="A routing trace.", metavar="TRACE.npz", show_default=False)
]
