"""The command line: one command per file in `commands/`, which import what is heavy when they are
called."""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated

import typer

from ane_moe.commands.table import EXAMPLES, command_of, examples_text
from ane_moe.errors import UserError

# What those see who do not know where to begin.
FIRST_STEPS = """\
Mixture-of-Experts language models on the Apple Neural Engine: convert, prove, measure.

To begin with:
  ane-moe plan CHECKPOINT                  does it fit, how fast would it be, which way to take
  ane-moe convert CHECKPOINT OUT --golden  make Core ML packages of it
  ane-moe verify OUT                       prove them right, on any machine

CHECKPOINT is a model folder, a GGUF file, OWNER/NAME on the Hugging Face Hub, or `demo`, a tiny
built-in model. `ane-moe doctor` looks at this machine, `ane-moe --help` lists all commands."""

ANYWHERE = ("--debug", "--quiet")  # options that stand before or behind a command's name

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)
for name in EXAMPLES:
    app.command(name, epilog=examples_text(name))(command_of(name))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Nothing on stderr but errors: no progress, no notes.")
    ] = False,
) -> None:
    """Mixture-of-Experts language models on the Apple Neural Engine: convert, prove, measure.

    Exit codes: 0 done and every gate passed, 1 a gate failed, 2 bad input or usage. --debug and
    --quiet may stand behind a command too. Colours and moving bars go to terminals alone, and to
    none with NO_COLOR set.
    """
    if context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS)
    elif quiet:  # until the command has ended: what went wrong is said after that
        nowhere = context.with_resource(open(os.devnull, "w"))  # noqa: SIM115
        context.with_resource(redirect_stderr(nowhere))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Errors of the user's are one line on stderr; `--debug` shows
    where from."""
    arguments = _in_front(list(sys.argv[1:] if arguments is None else arguments))
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


def _in_front(arguments: list[str]) -> list[str]:
    """The options of all commands before the command's name; what follows `--` is no option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = [argument for argument in arguments[:end] if argument in ANYWHERE]
    rest = [argument for argument in arguments[:end] if argument not in ANYWHERE]
    return [*given, *rest, *arguments[end:]]
