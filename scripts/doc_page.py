"""A page of docs/, part of which a script writes."""

from pathlib import Path

from ane_moe.files import write_text


def put_into_page(page: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between the marks `begin` and `end`, each a line, in the place of what is
    there."""
    before, _, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2]
    write_text(page, f"{before}{begin}{text}\n{end}{after}")
