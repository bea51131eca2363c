"""`ane-moe cache`: the compiled models Core ML runs from, and the templates of conversions."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ane_moe.commands.options import AsJson

if TYPE_CHECKING:
    from ane_moe.emit.coreml.template_cache import Kept, TemplateCache
    from ane_moe.runtime.coreml.modelc_cache import Entry, ModelCache


def cache(
    clear: Annotated[
        bool,
        typer.Option("--clear", help="Remove templates, and models that no process has loaded."),
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
    """Show the caches: templates of conversions and, on macOS, compiled models. Clear or limit
    them."""
    from ane_moe.emit.coreml.template_cache import TemplateCache
    from ane_moe.errors import UserError
    from ane_moe.runtime.coreml.modelc_cache import ModelCache

    templates = TemplateCache(folder / "templates" if folder else None)
    models = ModelCache(folder) if folder or sys.platform == "darwin" else None
    if models is None and limit_gb is not None:
        raise UserError("--limit-gb is of compiled models", "no macOS", "leave it out")
    gone = templates.clear() if clear else []
    removed = models.clear() if models and clear else []
    if models and limit_gb is not None:
        removed = removed + models.set_limit(int(limit_gb * 1e9))
    if as_json:
        document = _models_document(models, removed) if models else {}
        typer.echo(json.dumps(document | _templates_document(templates, gone), indent=2))
        return
    _print_templates(templates, gone)
    if models:
        _print(models, removed)


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
    import datetime

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, talk = Console(), Console(stderr=True)
    if removed:
        talk.print(f"removed {len(removed)} compiled models, {_size(removed)}")
    entries = store.entries()
    if entries:
        table = Table("package", "size", "last used", "state", box=None, pad_edge=False)
        for entry in entries:
            used = datetime.datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
            state = (
                "in use"
                if entry.in_use
                else f"good for {', '.join(entry.good)}"
                if entry.good
                else "untried"
            )
            table.add_row(Text(ascii(entry.name)[1:-1]), _size([entry]), used, Text(state))
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
