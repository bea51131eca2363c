"""A page of docs/, parts of which scripts write: each between two lines of comments."""

from dataclasses import dataclass
from pathlib import Path

from ane_moe.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class PagePart:
    """What stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a page of docs/."""

    page: str
    name: str

    @property
    def path(self) -> Path:
        return DOCS / self.page

    @property
    def text(self) -> str:
        return self._split()[1]

    def page_with(self, text: str) -> str:
        """The whole page, with `text` in the place of what stands there."""
        before, _, after = self._split()
        return f"{before}{text}\n{after}"

    def write(self, text: str) -> None:
        write_text(self.path, self.page_with(text))

    def _split(self) -> tuple[str, str, str]:
        """The page up to the part, the part, and the rest. Raises ValueError for a page without the
        comments."""
        page = self.path.read_text(encoding="utf-8")
        begin, end = f"<!-- {self.name}: begin -->\n", f"<!-- {self.name}: end -->"
        start, stop = page.index(begin) + len(begin), page.index(end)
        return page[:start], page[start:stop], page[stop:]
