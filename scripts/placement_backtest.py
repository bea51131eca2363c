"""Hold the placement rules against what people published: print the table of docs/placement.md, or
put it there.

    python scripts/placement_backtest.py [--write]

Exits with 1 when a prediction of `ane` or `cpu` is wrong.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.placement.published.backtest import outcomes, table  # noqa: E402

PAGE = ROOT / "docs" / "placement.md"
MARKED = re.compile(r"(<!-- back-test -->\n).*(<!-- end of back-test -->)", re.DOTALL)


def main() -> int:
    rows = outcomes()
    text = table(rows)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(MARKED.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text()))
    else:
        print(text)
    return int(any(row.grade == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
