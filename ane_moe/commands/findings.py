"""What `verify` finds, and how it is shown."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType

from ane_moe.commands.interruption import ended_by_interrupt
from ane_moe.hub.fetched import address_of
from ane_moe.origins import shown
from ane_moe.placement.result import PlacementReport
from ane_moe.report.against_table import against_report
from ane_moe.report.placement_table import placement_report
from ane_moe.report.step_bar import step_bar
from ane_moe.report.verify_table import verify_report
from ane_moe.verification.pairs import AgainstReport
from ane_moe.verification.result import VerifyReport

BROKEN_OFF = "broken off: what was proved is kept, the same command goes on"


@dataclass(frozen=True)
class Findings:
    """What was found of the conversion in `out`; None: not looked at."""

    out: Path
    report: VerifyReport | None
    placement: PlacementReport | None
    second: AgainstReport | None

    @property
    def passed(self) -> bool:
        parts = (self.report, self.placement, self.second)
        return all(part.passed for part in parts if part is not None)

    def besides(self, against: str | None) -> str:
        """What was looked at besides a golden, with the name that was given of a second runtime."""
        looked = {"placement": self.placement, str(against): self.second}
        return " and ".join(name for name, part in looked.items() if part)

    def as_json(self) -> dict[str, Any]:
        document = self.report.as_json() if self.report else {"folder": shown(self.out)}
        document |= {"placement": self.placement.as_json()} if self.placement else {}
        document |= {"against": self.second.as_json()} if self.second else {}
        return document | {"passed": self.passed}

    def tables(self) -> Iterator[RenderableType]:
        if self.report:
            yield verify_report(self.report)
        if self.placement:
            yield placement_report(self.placement)
        if self.second:
            yield against_report(self.second)


def find(
    out: Path,
    prove: Callable[..., VerifyReport] | None,
    place: Callable[..., PlacementReport] | None,
    compare: Callable[..., AgainstReport] | None,
) -> Findings:
    """Look at what there is a call for, with a bar on stderr; where files are damaged, at nothing
    else. Ctrl-C ends the command. Raises UserError as the calls do."""
    report = placement = second = None
    with step_bar() as progress:
        if prove:
            with ended_by_interrupt(BROKEN_OFF):
                report = prove(progress=progress)
        if not (report and report.integrity):
            placement = place(progress=progress) if place else None
            second = compare(progress=progress) if compare else None
    return Findings(out, report, placement, second)


def show(found: Findings, as_json: bool) -> None:
    """Print what was found."""
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        Console().print(*found.tables(), sep="\n", soft_wrap=True)  # a path stays on one line


def write_page(found: Findings, page: Path, target: str) -> None:
    """Write it as a page, with speed predicted for the target. Raises UserError."""
    from ane_moe.files import write_named_by_user
    from ane_moe.report.html import render_html
    from ane_moe.report.report_data import gather

    data = gather(found.out, verify=found.report, placement=found.placement, target=target)
    write_named_by_user(page, render_html(data))


def next_diff(found: Findings) -> str | None:
    """The command that shows where two runtimes part, if they do: of the first such function."""
    parted = [row for row in found.second.pairs if not row.passed] if found.second else []
    if found.second is None or not parted:
        return None
    row, folder = parted[0], address_of(found.out) or found.out
    where = f"{folder}/{row.path} --function {row.function} --runtime-b {found.second.runtime}"
    return f"next: ane-moe diff {where}  # the first operation where they part"
