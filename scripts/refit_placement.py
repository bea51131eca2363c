"""What feedback files that people sent say of the placement rules and of the estimates.

    python scripts/refit_placement.py placement-feedback.json ...

Prints, for each file, how the predictions of each rule fared, the functions that were placed
otherwise than predicted, and, where the file has what Core ML's segmenter estimated, the leaves
that ane_moe/placement/estimates.toml lacks for this chip and system or has otherwise, as rows for
it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.errors import UserError  # noqa: E402
from ane_moe.placement.estimates import EstimateBook, estimate_book  # noqa: E402
from ane_moe.placement.feedback import COLUMNS, FORMAT  # noqa: E402
from ane_moe.placement.machine import Machine, matching_target  # noqa: E402
from ane_moe.placement.targets import find_target  # noqa: E402

KNOWN = 1e-3  # an estimate that is right within this is known
DIGITS = 4  # rates that agree in so many are one leaf
ON_ENGINE, OFF_ENGINE = 0.9, 0.1  # shares of the operations from which a function is on one side


def read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), "ask for the file again") from None
    if document.get("format") != FORMAT:
        raise UserError(
            f"{path} is of another format", str(document.get("format")), f"this reads {FORMAT}"
        )
    return dict(document)


def surprises(document: dict[str, Any]) -> Iterator[str]:
    """Functions that were placed otherwise than predicted."""
    for function in document["functions"]:
        total = function["ops_ane"] + function["ops_cpu"] + function["ops_gpu"]
        share = function["ops_ane"] / total if total else 0.5
        found = "ane" if share >= ON_ENGINE else "cpu" if share <= OFF_ENGINE else "mixed"
        if found != function["predicted"]:
            yield (
                f"  {function['ops']} operations, {function['weight_bytes'] / 1e6:.3g} MB: "
                f"predicted {function['predicted']}, was {found}, "
                f"margins {function['margins_ms']} ms"
            )


def rows(document: dict[str, Any], book: EstimateBook, chip: str, system: int) -> Iterator[str]:
    """Leaves that are not known, in the form of estimates.toml."""
    leaves: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for entry in document.get("estimates", ()):
        facts, ms = {"op": entry["op"], **entry["facts"]}, entry["ms"]
        if any(_same(ms, candidate.times) for candidate in book.candidates(facts)[:1]):
            continue
        work, per_byte = book.measures(facts)
        rates = tuple(f"{work / time / 1e6 if time else 0:.{DIGITS}g}" for time in ms)
        leaves.setdefault((entry["op"], rates), []).append(per_byte)
    for (kind, rates), seen in sorted(leaves.items()):
        yield f'[[leaf]]\nops = ["{kind}"]\nchips = "{chip}"\nos = "{system}"'
        yield f'when = "ops_per_byte >= {min(seen):.4g} and ops_per_byte <= {max(seen):.4g}"'
        yield f'work = "{book.work_of(kind)}"\nrate = [{", ".join(rates)}]'
        yield f'source = "{len(seen)} operations of a feedback file"\nconfidence = "measured"\n'


def _same(found: list[float | None], ours: tuple[float, ...]) -> bool:
    pairs = zip(found, ours, strict=True)
    return all(ms is None or abs(ms - mine) <= KNOWN * max(ms, mine) for ms, mine in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args(arguments).files:
        document = read(path)
        target = matching_target(Machine(document["chip"], document["os"]), find_target())
        print(
            f"{path.name}: {document['chip']}, OS {document['os']}, {len(document['functions'])} "
            f"functions"
        )
        for rule, counts in sorted(document["rules"].items()):
            print(f"  {rule}: " + ", ".join(f"{counts[column]} {column}" for column in COLUMNS))
        for line in surprises(document):
            print(line)
        for line in rows(document, estimate_book(target), target.generation, target.os):
            print(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"refit_placement: {error}")
