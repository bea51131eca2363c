"""Write docs/cli.md: every command with its examples, arguments and options, from the command line
itself.

    python scripts/cli_page.py [--check]

--check writes nothing and exits with 1 when the page is stale.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.cli import FIRST_STEPS, app  # noqa: E402
from ane_moe.commands.table import EXAMPLES  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
HEAD = """\
# Commands

Made by `python scripts/cli_page.py` from the commands' own help. Data go to stdout, progress and
notes to stderr; exit codes are 0 (done, every gate passed), 1 (a gate failed) and 2 (bad input or
usage, one line on stderr). `--json` prints one document with stable names and units in them.
`--quiet` leaves stderr to errors, `--debug` shows tracebacks; both stand before or behind the
command. Colours and moving bars go to terminals alone, and to none with `NO_COLOR` set. `ane-moe
--install-completion` completes commands and options in bash, zsh, fish and PowerShell."""


def commands() -> dict[str, Any]:
    """The commands of the program, as they parse."""
    found: dict[str, Any] = typer.main.get_command(app).commands
    return found


def rendered() -> str:
    """The whole page."""
    index = "\n".join(f"* [{name}](#{name}): {_summary(one)}" for name, one in commands().items())
    parts = [HEAD, _code(FIRST_STEPS), index]
    parts += [part for name, one in commands().items() for part in _section(name, one)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}"
    yield _prose(inspect.cleandoc(command.help or ""))
    yield _code("\n".join(f"{call}\n    # {why}" for call, why in EXAMPLES[name]))
    shown = [parameter for parameter in command.params if parameter.name != "help"]
    if shown:
        yield _table(_row(parameter) for parameter in shown)


def _row(parameter: Any) -> tuple[str, str]:
    help_text = re.sub(r"\s+", " ", getattr(parameter, "help", None) or "")
    default = "" if parameter.required else _default(parameter)
    return _call(parameter), f"{help_text}{default}".replace("|", "\\|")


def _call(parameter: Any) -> str:
    """How it is written on the command line."""
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name.upper()).strip("[]{}")
        return f"`{name}`" if parameter.required else f"`[{name}]`"
    names = ", ".join(parameter.opts)
    if parameter.is_flag:
        both = (parameter.opts[0], *parameter.secondary_opts[:1])
        return f"`{' / '.join(both)}`"
    value = parameter.metavar or _kind(parameter.type_descriptor.annotation)
    return f"`{names} {value}`".replace("|", "\\|")


def _kind(annotation: Any) -> str:
    """What a value may be: names, or a type."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    inner = next(iter(get_args(annotation)), annotation)  # of a list
    return str(inner.__name__).upper()


def _default(parameter: Any) -> str:
    """What holds where it is not given, unless the help says so."""
    shown = parameter.show_default
    value = shown if isinstance(shown, str) else parameter.default
    told = "[default" in (parameter.help or "")
    if told or value is None or value is False or value == "" or not shown:
        return ""
    return f" Default: {value}."


def _summary(command: Any) -> str:
    first = (command.help or "").split("\n\n")[0]
    return re.sub(r"\s+", " ", first.partition(". ")[0]).strip().rstrip(".")


def _prose(text: str) -> str:
    return "\n\n".join(re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n"))


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {one} | {two} |" for one, two in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    fresh = rendered()
    if parser.parse_args().check:
        sys.exit(int(not PAGE.is_file() or PAGE.read_text() != fresh))
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
