"""`ane-moe unredact`: what placeholders stand for, in their places again."""

from pathlib import Path
from typing import Annotated

import typer

from ane_moe.commands.options import Beside, TextFile, TextOrFiles


def unredact(
    mapping: Annotated[
        Path,
        typer.Option(
            help="The table that `redact --mapping` wrote.", metavar="FILE", show_default=False
        ),
    ],
    text: TextOrFiles = None,
    file: TextFile = None,
    beside: Beside = False,
) -> None:
    """Put back what numbered placeholders stand for: of a redacted text all of it, byte for byte,
    and of any text that was made of one."""
    from ane_moe.commands.documents import sources, write_beside, write_out
    from ane_moe.redaction.documents import beside as place_beside
    from ane_moe.redaction.placeholders import read_mapping, restored_stream

    table = read_mapping(mapping)
    for source in sources(file, text):
        pieces = restored_stream(source.characters(), table)
        if beside and source.path:
            place = place_beside(source.path, "restored")
            write_beside(place, pieces)
            typer.echo(place, err=True)
        else:
            write_out(pieces)
            if source.text is not None:
                typer.echo()
