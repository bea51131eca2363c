"""The command line: one command per file in `commands/`, which import what is heavy when they are
called."""

import gc
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ane_moe.commands.align import align
from ane_moe.commands.bench import bench
from ane_moe.commands.cache import cache
from ane_moe.commands.cache_study import cache_study
from ane_moe.commands.chat import chat
from ane_moe.commands.convert import convert
from ane_moe.commands.demo import demo
from ane_moe.commands.diff import diff
from ane_moe.commands.generate import generate
from ane_moe.commands.group import group
from ane_moe.commands.inspect import inspect
from ane_moe.commands.plan import plan
from ane_moe.commands.probe import probe
from ane_moe.commands.redact import redact
from ane_moe.commands.report import report
from ane_moe.commands.run import run
from ane_moe.commands.trace import trace
from ane_moe.commands.unredact import unredact
from ane_moe.commands.verify import verify
from ane_moe.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    plan,
    convert,
    verify,
    generate,
    chat,
    redact,
    unredact,
    bench,
    report,
    trace,
    group,
    cache_study,
    align,
    inspect,
    run,
    diff,
    probe,
    demo,
    cache,
):
    app.command(command.__name__.replace("_", "-"))(command)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Mixture-of-Experts language models on the Apple Neural Engine: convert, prove, measure.

    Exit codes: 0 done and every gate passed, 1 a gate failed, 2 bad input or usage.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Errors of the user's are one line on stderr; `--debug` shows
    where from."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(arguments, prog_name="ane-moe")
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"ane-moe: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        # what torch and coremltools hold would be searched for garbage once more: a second
        gc.freeze()
