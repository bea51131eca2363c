"""`ane-moe redact`: a text without what is private in it."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_moe.commands.options import (
    AsJson,
    Beside,
    RuntimeName,
    TextFile,
    TextOrFiles,
    opened_out,
)
from ane_moe.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ane_moe.commands.documents import Source
    from ane_moe.progress import Progress
    from ane_moe.redaction.placeholders import Placeholders
    from ane_moe.redaction.redactor import Marked, Redactor

# Forms, and what the names of files in them end with; a text keeps its own ending.
FORMS = {"text": "", "json": ".json", "spans": ".jsonl", "html": ".html", "check": ".txt"}
SCHEMES = ("bio", "bioes")
KB = 1000

Shards = Annotated[
    Path,
    typer.Argument(
        help="Folder of a conversion of a privacy filter, hf://OWNER/NAME, or `demo`.",
        callback=opened_out,
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(help="Look for these only, as email,phone.", show_default="all of the model's"),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=(
            "text, json, spans (a JSON object a line), html (the original in colour) or check "
            "(where spans begin)."
        ),
        show_default="text; on a terminal the original in colour",
    ),
]
Placeholder = Annotated[str, typer.Option(help="What to put in place of what was found.")]
Numbering = Annotated[
    bool,
    typer.Option(
        "--numbered", help="Number placeholders: the same text gets the same, as [EMAIL_1]."
    ),
]
MappingFile = Annotated[
    Path | None,
    typer.Option(
        help="Write what numbered placeholders stand for, for `unredact`, readable by you.",
        metavar="FILE",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Biases of the decoder: default (none), precision, recall.",
        show_default="the model's own",
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(help="Print the label of every token instead, as bio or bioes."),
]
Unit = Annotated[str, typer.Option(help="What is looked at by itself: paragraph or line.")]
Check = Annotated[
    bool,
    typer.Option("--check", help="Exit with 1 when anything is found; say where, not what it is."),
]


def redact(
    shards: Shards,
    text: TextOrFiles = None,
    file: TextFile = None,
    labels: Labels = None,
    form: Format = None,
    placeholder: Placeholder = "[{LABEL}]",
    numbered: Numbering = False,
    mapping: MappingFile = None,
    preset: Preset = None,
    scheme: Scheme = None,
    unit: Unit = "paragraph",
    beside: Beside = False,
    check: Check = False,
    runtime: RuntimeName = "auto",
    as_json: AsJson = False,
) -> None:
    """Find what is private in a text, and put placeholders in its place.

    The text is TEXT, files (`--file A B C`), or standard input, in UTF-8; what lies outside the
    spans stays as it is, byte for byte. Files are never changed.
    """
    from ane_moe.commands.documents import sources
    from ane_moe.redaction.documents import ENDS
    from ane_moe.redaction.placeholders import Numbered, Plain, Template, write_mapping
    from ane_moe.redaction.redactor import open_redactor
    from ane_moe.redaction.viterbi import PRESETS

    form = "json" if as_json else form
    _require_one_of("--format", form, FORMS)
    _require_one_of("--preset", preset, PRESETS)
    _require_one_of("--scheme", scheme, SCHEMES)
    _require_one_of("--unit", unit, ENDS)
    documents = sources(file, text)
    if mapping and not mapping.parent.is_dir():
        raise UserError(f"{mapping} cannot be written", "no such folder", "name another file")
    template = Template(placeholder)
    places = Numbered(template) if numbered or mapping else Plain(template)
    redactor = open_redactor(
        _converted_demo() if str(shards) == "demo" else shards,
        None if labels is None else labels.split(","),
        PRESETS[preset] if preset else None,
        runtime,
    )
    job = Job(redactor, places, unit, form or ("check" if check else None), scheme, beside)
    try:
        found = job.run(documents)
    finally:
        if mapping and isinstance(places, Numbered):
            write_mapping(mapping, places)
    if redactor.approximate:
        typer.echo(_seams(redactor), err=True)
    if check and found:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Job:
    """How documents are redacted, and in which form they are given out (None: as the place they go
    to wants it)."""

    redactor: "Redactor"
    places: "Placeholders"
    unit: str
    form: str | None
    scheme: str | None
    beside: bool

    def run(self, documents: "list[Source]") -> int:
        """Give out all documents; return the number of spans that were found."""
        from ane_moe.progress import silent
        from ane_moe.report.step_bar import step_bar

        in_view = not self.beside and sys.stdout.isatty()  # a bar would be between the lines
        with nullcontext(silent) if in_view else step_bar() as progress:
            return sum(self._give(document, in_view, progress) for document in documents)

    def _give(self, document: "Source", in_view: bool, progress: "Progress") -> int:
        from rich.console import Console

        from ane_moe.commands.documents import write_beside, write_out
        from ane_moe.redaction.documents import beside
        from ane_moe.report.redaction_forms import view_form

        found = 0

        def passages() -> "Iterator[Marked]":
            nonlocal found
            done = 0
            for one in self._marked(document):
                found += len(one.passage.spans)
                done += len(one.passage.text.encode())
                yield one
                progress(f"{document.name} (kB)", done // KB, max(done, document.size) // KB)

        if self.beside and document.path:
            path = beside(document.path, "redacted", self._suffix)
            write_beside(path, self._chunks(passages(), document))
            typer.echo(path, err=True)
        elif in_view and not (self.form or self.scheme):
            console = Console(highlight=False)
            for view in view_form(passages(), self.redactor.labels):
                console.print(view, end="", soft_wrap=True)
            console.print()
        else:
            write_out(self._chunks(passages(), document))
        return found

    def _marked(self, document: "Source") -> "Iterator[Marked]":
        from ane_moe.redaction.documents import pieces
        from ane_moe.redaction.redactor import marked

        for passage in self.redactor.passages(pieces(document.characters(), self.unit)):
            yield marked(passage, self.places)

    @property
    def _suffix(self) -> str:
        return ".tsv" if self.scheme else FORMS[self.form or "text"]

    def _chunks(self, passages: "Iterator[Marked]", document: "Source") -> "Iterator[str]":
        """The document in its form."""
        from ane_moe.report import redaction_forms as forms

        source = str(document.path) if document.path else None
        if self.scheme:
            return forms.token_form(passages, self.scheme)
        if self.form == "json":
            return forms.json_form(passages, source)
        if self.form == "html":
            return forms.html_form(passages, self.redactor.labels, source)
        if self.form == "spans":
            return forms.span_form(passages)
        if self.form == "check":
            return forms.check_form(passages, document.name)
        ending = ("\n",) if document.text is not None else ()
        return chain(forms.text_form(passages), ending)


def _seams(redactor: "Redactor") -> str:
    longest, context = max(redactor.scorer.lengths), redactor.scorer.context_each_side
    return (
        f"ane-moe: texts longer than {longest} tokens went in windows, too short for the model's "
        f"context of {context} tokens on each side: labels near their seams may differ; convert "
        "with longer --lengths"
    )


def _converted_demo() -> Path:
    from ane_moe.demo.shards import built_in_shards

    return built_in_shards("demo-privacy", lambda line: typer.echo(f"ane-moe: {line}", err=True))


def _require_one_of(option: str, given: str | None, there: "Iterable[str]") -> None:
    if given is not None and given not in there:
        raise UserError(f"unknown {option}", given, f"it is one of {', '.join(there)}")
