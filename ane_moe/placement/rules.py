"""The rules of placement, as data (`rules.toml`), and the engine that tells which of them hold.

The engine knows no rule by name: a rule applies where its operation types, chips and systems match
and its condition holds for the facts.
"""

import functools
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.placement.predicate import Facts, compile_condition, names_in
from ane_moe.placement.targets import Target

RULES = Path(__file__).with_name("rules.toml")
VERDICTS = ("ane", "cpu", "uncertain")
SCOPES = ("op", "feature", "function", "segment")
# From what Apple documents, through what several or one measured with numbers, to what we derive
# and what people say.
CONFIDENCES = ("apple", "measured", "reported", "derived", "folklore")
BINDING = ("apple", "measured")  # a `cpu` verdict of these breaks a gate


@dataclass(frozen=True)
class Rule:
    """One row. `scope` says whose facts the condition reads: an operation's, those of a function's
    input, output or state (feature), a function's, or what the cost decision made of operations
    that the engine may run (segment).

    `against` is evidence of the contrary: it is quoted, and the verdict becomes `uncertain`.
    `claim` is what the rule would say without it.
    """

    id: str
    scope: str
    claim: str
    reason: str
    source: str
    confidence: str
    ops: tuple[str, ...] = ("*",)
    when: str = ""
    remedy: str = ""
    chips: str = "all"
    os: str = "all"
    against: str = ""

    @property
    def verdict(self) -> str:
        return "uncertain" if self.against else self.claim

    @property
    def binding(self) -> bool:
        """Whether this rule alone takes something off the engine beyond reasonable doubt."""
        return self.verdict == "cpu" and self.confidence in BINDING


class RuleBook:
    """The rules that hold for one target, whose limits, generation (`chip`) and `system` are facts
    of every scope."""

    def __init__(self, rules: tuple[Rule, ...], target: Target):
        self.target = target
        self.rules = {rule.id: rule for rule in rules}
        self.constants = {f"cap_{name}": size for name, size in target.limits.items()} | {
            "chip": target.number,
            "system": target.os,
        }
        self._by_scope: dict[str, list[tuple[Rule, Callable[[Facts], bool]]]] = {
            scope: [] for scope in SCOPES
        }
        for rule in rules:
            if covers(rule.chips, target.number, target.device) and covers(rule.os, target.os, ""):
                condition = compile_condition(rule.when) if rule.when else lambda facts: True
                self._by_scope[rule.scope].append((rule, condition))
        self._by_op: dict[str, list[tuple[Rule, Callable[[Facts], bool]]]] = {}

    def matching(self, scope: str, facts: Facts) -> Iterator[Rule]:
        """The rules of `scope` that hold for `facts`, in the order of the file."""
        known = {**self.constants, **facts}
        rules = self._for_op(str(facts["op"])) if scope == "op" else self._by_scope[scope]
        return (rule for rule, condition in rules if condition(known))

    def _for_op(self, kind: str) -> list[tuple[Rule, Callable[[Facts], bool]]]:
        if kind not in self._by_op:
            self._by_op[kind] = [
                entry for entry in self._by_scope["op"] if {kind, "*"} & set(entry[0].ops)
            ]
        return self._by_op[kind]


def rule_book(target: Target) -> RuleBook:
    """The rules in `rules.toml` that hold for `target`."""
    return RuleBook(load_rules(), target)


@functools.cache
def load_rules(path: Path = RULES) -> tuple[Rule, ...]:
    """Every rule. Raises ValueError for a rule that is not sound."""
    data = tomllib.loads(path.read_text())
    rules = tuple(_rule(entry) for entry in data["rule"])
    ids = [rule.id for rule in rules]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"rules of the same id: {sorted(twice)}")
    return rules


def _rule(entry: dict[str, Any]) -> Rule:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
    }
    rule = Rule(claim=fields.pop("verdict"), **fields)
    wrong = [
        name
        for name, value, known in (
            ("verdict", rule.claim, VERDICTS),
            ("scope", rule.scope, SCOPES),
            ("confidence", rule.confidence, CONFIDENCES),
        )
        if value not in known
    ]
    if wrong or not rule.reason or not rule.source or (rule.verdict == "cpu" and not rule.remedy):
        raise ValueError(f"rule {rule.id}: {wrong or 'reason, source or remedy is missing'}")
    if rule.when:
        compile_condition(rule.when)
    covers(rule.chips, 0, ""), covers(rule.os, 0, "")
    return rule


def facts_named(rule: Rule) -> set[str]:
    """The facts a rule's condition reads."""
    return set(names_in(rule.when)) if rule.when else set()


def covers(terms: str, number: int, device: str) -> bool:
    """`all`, or any of: a device, `h16`, `h16+`, `h13-h15` (without the h for systems)."""
    return any(_termcovers(term.strip(), number, device) for term in terms.split(","))


def _termcovers(term: str, number: int, device: str) -> bool:
    if term in ("all", "mac", "iphone"):
        return term in ("all", device)
    first, _, last = term.replace("h", "").partition("-")
    if first.endswith("+"):
        return number >= int(first[:-1])
    return int(first) <= number <= int(last or first)
