"""Fit the thresholds of the cost decision again, from published placements and feedback files that
people sent.

    python scripts/refit_placement.py [placement-feedback.json ...]

Prints what each file says of the rules, and a [thresholds] table for ane_moe/placement/rules.toml.
A threshold moves only where that makes fewer predictions wrong, or as many wrong and fewer
uncertain. With the published placements alone it promises the engine to more graphs than 32 samples
bear out: look at how many support a threshold before taking it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ane_moe.errors import UserError  # noqa: E402
from ane_moe.placement.feedback import COLUMNS, FORMAT  # noqa: E402
from ane_moe.placement.rules import RuleBook, load_rules  # noqa: E402
from ane_moe.placement.targets import find_target  # noqa: E402

FACTS = ("weight_bytes", "flops", "reduction", "ops")
# Which fact each threshold cuts.
CUTS = {
    "small_bytes": "weight_bytes",
    "medium_bytes": "weight_bytes",
    "large_bytes": "weight_bytes",
    "small_flops": "flops",
    "large_flops": "flops",
    "short_reduction": "reduction",
    "few_ops": "ops",
}
WRONG = 1000  # one wrong prediction weighs as much as this many uncertain ones
ON_ENGINE = 0.9  # share of the operations from which a function counts as placed on the engine
OFF_ENGINE = 0.1


@dataclass(frozen=True)
class Sample:
    facts: dict[str, float]
    on_engine: bool


def published() -> Iterator[Sample]:
    """The published placements that only the cost decision has a say in."""
    from ane_moe.placement.published.backtest import outcomes

    for row in outcomes():
        facts, legal = row.facts, all(rule.startswith("cost-") for rule in row.rules)
        if legal and row.point.reported in ("ane", "cpu"):
            yield Sample(facts, row.point.reported == "ane")


def sent(path: Path) -> Iterator[Sample]:
    """Functions of a feedback file that no other rule has a say in, and that were placed one
    way."""
    for function in read(path)["functions"]:
        total = function["ops_ane"] + function["ops_cpu"] + function["ops_gpu"]
        share = function["ops_ane"] / total if total else 0.5
        if function["legal"] and not OFF_ENGINE < share < ON_ENGINE:
            yield Sample({name: function[name] for name in FACTS}, share >= ON_ENGINE)


def read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", str(error), "ask for the file again") from None
    if document.get("format") != FORMAT:
        raise UserError(
            f"{path} is of another format", str(document.get("format")), f"this reads {FORMAT}"
        )
    return document


def grade(samples: list[Sample], thresholds: dict[str, float]) -> tuple[int, int]:
    """(wrong, uncertain) predictions."""
    book = RuleBook(load_rules()[0], thresholds, find_target())
    verdicts = [
        (next(book.matching("segment", sample.facts)).verdict, sample.on_engine)
        for sample in samples
    ]
    wrong = sum(
        verdict != ("ane" if on_engine else "cpu")
        for verdict, on_engine in verdicts
        if verdict != "uncertain"
    )
    return wrong, sum(verdict == "uncertain" for verdict, _ in verdicts)


def refit(samples: list[Sample], thresholds: dict[str, float]) -> dict[str, float]:
    """Move one threshold at a time to the best of the middles between neighbouring samples, until
    none moves."""
    best, moved = dict(thresholds), True
    while moved:
        moved = False
        for name, fact in CUTS.items():
            values = sorted({sample.facts[fact] for sample in samples} | {0.0})
            for candidate in ((a + b) / 2 for a, b in pairwise(values)):
                trial = best | {name: candidate}
                if _cost(samples, trial) < _cost(samples, best):
                    best, moved = trial, True
    return best


def _cost(samples: list[Sample], thresholds: dict[str, float]) -> int:
    wrong, uncertain = grade(samples, thresholds)
    return WRONG * wrong + uncertain


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args(arguments).files
    samples = list(published())
    for path in files:
        document = read(path)
        print(
            f"{path.name}: {document['chip']}, OS {document['os']}, {len(document['functions'])} "
            f"functions"
        )
        for rule, counts in sorted(document["rules"].items()):
            print(f"  {rule}: " + ", ".join(f"{counts[column]} {column}" for column in COLUMNS))
        samples += sent(path)
    _, thresholds = load_rules()
    fitted = refit(samples, thresholds)
    for title, table in (("now", thresholds), ("fitted", fitted)):
        wrong, uncertain = grade(samples, table)
        print(f"{title}: {wrong} wrong, {uncertain} uncertain of {len(samples)}")
    print("\n[thresholds]")
    for name, value in fitted.items():
        print(f"{name} = {value:g}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"refit_placement: {error}")
