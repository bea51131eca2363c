"""The report that the page shows: what `ane-moe report` wrote, or what the conversion itself
says."""

from pathlib import Path

WRITTEN = "report.html"


def report_of(folder: Path) -> str:
    """A page on the conversion in `folder`. Nothing is verified for it. Raises UserError."""
    from ane_moe.report.html import render_html
    from ane_moe.report.report_data import gather

    written = folder / WRITTEN
    if written.is_file():
        return written.read_text(encoding="utf-8")
    return render_html(gather(folder))
