"""`ane-moe cache`: templates of conversions, what was fetched, and the compiled models that Core ML
runs from."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from ane_moe.emit.coreml.template_cache import Kept, TemplateCache
    from ane_moe.fetched_folders import FetchedFolder
    from ane_moe.runtime.coreml.modelc_cache import Entry, ModelCache


def cache(
    clear: Annotated[
        bool,
        typer.Option("--clear", help="Remove templates, and models that no process has loaded."),
    ] = False,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            "--remove",
            help="Remove what was fetched of an address, or of OWNER/NAME[@REVISION] on the Hub; "
            "repeat for more.",
            metavar="ADDRESS",
        ),
    ] = None,
    remove_all: Annotated[
        bool, typer.Option("--remove-all", help="Remove all that was fetched.")
    ] = False,
    limit_gb: Annotated[
        float | None,
        typer.Option(
            "--limit-gb", min=0.0, metavar="GB", help="Set the size limit and keep to it."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Another cache folder.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the caches: templates of conversions, what was fetched of addresses and of the Hub, and,
    on macOS, compiled models. Clear or limit them.

    What was fetched stays until it is removed by name, or all of it. What another run fetches or
    uses just then is not removed; the Hub's own cache (`hf cache`) is another one.

    Names are those of other commands: of a GGUF file, or :KIND, all goes that is kept with it; a
    branch is the commit that it was when it was last seen.
    """
    from ane_moe.emit.coreml.template_cache import TemplateCache
    from ane_moe.errors import UserError
    from ane_moe.fetched_folders import fetched_folders, of_origin
    from ane_moe.fetched_folders import remove as remove_folders
    from ane_moe.runtime.coreml.modelc_cache import ModelCache
    from ane_moe.user_cache import user_cache
    from ane_moe.wording import listed

    templates = TemplateCache(folder / "templates" if folder else None)
    models = ModelCache(folder) if sys.platform == "darwin" else None
    if models is None and limit_gb is not None:
        raise UserError("--limit-gb is of compiled models", "no macOS", "leave it out")
    root = folder or user_cache()
    wanted = [one for text in remove or () for one in of_origin(text, root)]
    wanted = fetched_folders(root) if remove_all else wanted
    gone = templates.clear() if clear else []
    forgotten = remove_folders(wanted, root)
    kept = fetched_folders(root)
    removed = models.clear() if models and clear else []
    if models and limit_gb is not None:
        removed = removed + models.set_limit(int(limit_gb * 1e9))
    if as_json:
        document = _models_document(models, removed) if models else {}
        document |= _templates_document(templates, gone) | _fetched_document(root, kept, forgotten)
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_templates(templates, gone)
        _print_fetched(root, kept, forgotten)
        if models:
            _print(models, removed)
    if busy := [one.origin for one in wanted if one not in forgotten]:
        found = "another run fetches, uses or removes it, or files cannot be locked"
        raise UserError(f"{listed(busy)} not removed", found, "try again when it has ended")


def _templates_document(store: "TemplateCache", removed: "list[Kept]") -> dict[str, Any]:
    kept = store.entries()
    return {
        "templates": {
            "folder": str(store.folder),
            "count": len(kept),
            "size_bytes": sum(entry.size_bytes for entry in kept),
            "removed": len(removed),
        }
    }


def _print_templates(store: "TemplateCache", removed: "list[Kept]") -> None:
    if removed:
        typer.echo(f"removed {len(removed)} templates", err=True)
    kept = store.entries()
    size = sum(entry.size_bytes for entry in kept) / 1e6
    typer.echo(f"{len(kept)} templates of conversions, {size:.1f} MB, in {store.folder}")


def _fetched_document(
    root: Path, kept: "list[FetchedFolder]", removed: "list[FetchedFolder]"
) -> dict[str, Any]:
    def fields(one: "FetchedFolder") -> dict[str, Any]:
        return {
            "address": one.origin,
            "holds": one.holds,
            "folder": str(one.folder),
            "size_bytes": one.size_bytes,
            "last_used_unix_seconds": one.last_used,
        }

    return {
        "fetched": {
            "folder": str(root),
            "size_bytes": sum(one.size_bytes for one in kept),
            "entries": [fields(one) for one in kept],
            "removed": [fields(one) for one in removed],
        }
    }


def _print_fetched(root: Path, kept: "list[FetchedFolder]", removed: "list[FetchedFolder]") -> None:
    from rich.console import Console

    if removed:
        typer.echo(f"removed {len(removed)} fetched folders, {_megabytes(removed)}", err=True)
    if kept:
        table = _table("fetched from", "holds", "size", "last used")
        for one in kept:
            size, used = _megabytes([one]), _minute(one.last_used)
            _add_row(table, one.origin, one.holds, size, used)
        Console().print(table)
    typer.echo(f"{len(kept)} fetched folders, {_megabytes(kept)}, in {root}")


def _megabytes(folders: "list[FetchedFolder]") -> str:
    return f"{sum(one.size_bytes for one in folders) / 1e6:.1f} MB"


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add_row(table: "Table", *cells: str) -> None:
    """Plain text, whatever is in a name."""
    from rich.text import Text

    table.add_row(*(Text(ascii(cell)[1:-1]) for cell in cells))


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _models_document(store: "ModelCache", removed: "list[Entry]") -> dict[str, Any]:
    entries = store.entries()
    return {
        "folder": str(store.folder),
        "os_build": store.os_build,
        "limit_bytes": store.limit_bytes,
        "size_bytes": sum(entry.size_bytes for entry in entries),
        "entries": [_fields(entry) for entry in entries],
        "removed": [_fields(entry) for entry in removed],
    }


def _fields(entry: "Entry") -> dict[str, Any]:
    return {
        "package": entry.name,
        "key": entry.key,
        "os_build": entry.os_build,
        "size_bytes": entry.size_bytes,
        "last_used_unix_seconds": entry.last_used,
        "in_use": entry.in_use,
        "good": list(entry.good),
    }


def _print(store: "ModelCache", removed: "list[Entry]") -> None:
    from rich.console import Console
    from rich.text import Text

    console, talk = Console(), Console(stderr=True)
    if removed:
        talk.print(f"removed {len(removed)} compiled models, {_size(removed)}")
    entries = store.entries()
    if entries:
        table = _table("package", "size", "last used", "state")
        for entry in entries:
            state = (
                "in use"
                if entry.in_use
                else f"good for {', '.join(entry.good)}"
                if entry.good
                else "untried"
            )
            _add_row(table, entry.name, _size([entry]), _minute(entry.last_used), state)
        console.print(table)
    console.print(
        Text(
            f"{len(entries)} compiled models, {_size(entries)} of at most "
            f"{store.limit_bytes / 1e9:.1f} GB, in {store.folder}"
        ),
        soft_wrap=True,
    )


def _size(entries: "list[Entry]") -> str:
    return f"{sum(entry.size_bytes for entry in entries) / 1e9:.2f} GB"
