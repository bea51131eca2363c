"""Write the op table of docs/runtime.md from the registry of the reference runtime.

    python scripts/make_op_table.py [--check]

Only what stands between the two markers is replaced. --check writes nothing and exits with 1 when
the page is stale.
"""

import argparse
import sys

from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from doc_page import PagePart

from ane_moe.runtime.reference.ops import STRUCTURAL, TABLE

PART = PagePart("runtime.md", "op table")
RELEASES = (15, 16, 17, 18)
INTERNAL = {"_const_symbolic", "coreml_update_state"}  # never in a saved package


def first_release(name: str) -> int:
    """The iOS release whose opset first has the op, as coremltools registers it; write_state exists
    only when saved."""
    versions = SSAOpRegistry.core_ops.get(name)
    return 18 if versions is None else max(15, min(int(target.name[3:]) for target in versions))


def note(name: str) -> str:
    if name in STRUCTURAL:
        return STRUCTURAL[name]
    notes = []
    for ios in RELEASES:
        op = TABLE.find(name, ios)
        if op is not None and op.note and (op.since, op.note) not in notes:
            notes.append((op.since, op.note))
    return "; ".join(
        text if since == first_release(name) else f"from iOS {since}: {text}"
        for since, text in notes
    )


def rows() -> list[str]:
    names = (set(SSAOpRegistry.core_ops) | set(STRUCTURAL)) - INTERNAL
    lines = ["| op | opsets | notes |", "|---|---|---|"]
    for name in sorted(names):
        since = first_release(name)
        opsets = f"iOS {since}-18" if since < 18 else "iOS 18"
        lines.append(f"| `{name}` | {opsets} | {note(name)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when the page is stale"
    )
    options = parser.parse_args()
    text = "\n".join(rows())
    if not options.check:
        PART.write(text)
    elif PART.text != f"{text}\n":
        sys.exit(1)


if __name__ == "__main__":
    main()
