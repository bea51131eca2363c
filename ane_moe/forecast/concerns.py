"""What the placement rules say of a conversion before a package exists.

Every concern is a rule of `rules.toml` that holds for the facts of what would be written
(planned_facts.py); no rule is known by name, and none has limits of its own here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ane_moe.conversion.plan import ConversionPlan
from ane_moe.errors import UserError
from ane_moe.forecast.planned_facts import PlannedFunction, facts_of_plan
from ane_moe.formats.recipe import Recipe
from ane_moe.formats.stored_form import stored_form
from ane_moe.placement.facts import FunctionFacts
from ane_moe.placement.predicted import judge
from ane_moe.placement.result import Finding
from ane_moe.placement.rules import Rule, RuleBook, facts_named, rule_book
from ane_moe.placement.targets import Target

OF_PACKAGE = {"weight_file_bytes", "package_functions"}  # facts of a package, not of one function
OF_STATES = ("read_state", "write_state", "state")  # operations and roles


@dataclass(frozen=True)
class Concern:
    """A placement rule that a kind of function, a weight format or the states would meet.

    verdict: cpu (off the engine) or uncertain; `against`: evidence of the contrary.
    `function_bytes`: the weights of what it is about, where it is about a function or a package;
    `tokens`: with how many tokens a call, where it is about a function.
    """

    kind: str
    rule: str
    verdict: str
    reason: str
    remedy: str
    against: str
    source: str
    function_bytes: int | None = None
    tokens: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What it is told from others by."""
        return self.kind, self.rule

    @property
    def state(self) -> str:
        """The verdict in words."""
        return "off the engine" if self.verdict == "cpu" else "undecided"

    @property
    def sentence(self) -> str:
        """Reason, evidence of the contrary, what to do instead, and the rule's name."""
        against = f"; against it: {self.against}" if self.against else ""
        return f"{self.reason}{against}; instead: {self.remedy} ({self.rule})"


def concerns_of_plan(plan: ConversionPlan, target: Target) -> tuple[Concern, ...]:
    """What speaks against the packages of a plan, a rule once for each kind of function."""
    book, recipe = rule_book(target), plan.options.recipe
    found: list[Concern] = []
    for planned in facts_of_plan(plan):
        for finding, what in _met(planned.facts, book, recipe):
            rule = book.rules[finding.rule]
            found.append(_concern(what, rule) if what else _of_function(planned, rule))
    return distinct(sorted(found, key=lambda concern: concern.function_bytes is not None))


def require_engine_formats(recipe: Recipe, target: Target) -> None:
    """Raise UserError where a weight format of `recipe` takes a whole model off the engine of a
    Mac."""
    if target.device == "mac" and recipe.leaving_engine:
        raise UserError(
            f"weights per block and palettes of vectors take the whole model off {target.name}'s "
            "Neural Engine",
            ", ".join(recipe.leaving_engine),
            "take int8 or lut4, or convert for the CPU with --allow-cpu",
        )


def distinct(concerns: Iterable[Concern]) -> tuple[Concern, ...]:
    """The first of each kind and rule, with the token counts of all."""
    first: dict[tuple[str, str], Concern] = {}
    for concern in concerns:
        known = first.setdefault(concern.key, concern)
        tokens = tuple(sorted({*known.tokens, *concern.tokens}))
        first[concern.key] = replace(known, tokens=tokens)
    return tuple(first.values())


def _met(function: FunctionFacts, book: RuleBook, recipe: Recipe) -> Iterator[tuple[Finding, str]]:
    """The findings that keep a function off the engine, or may, and what they are of where that is
    not the function itself."""
    formats = {stored_form(name): name for name in recipe.formats}
    stored = {op.name: op.facts["weight_format"] for op in function.ops}
    for finding in judge(function, function.name, book).findings:
        if finding.verdict == "ane" or finding.rule not in book.rules:  # no rule, no concern
            continue
        rule = book.rules[finding.rule]
        if "weight_format" in facts_named(rule):
            form = stored[finding.op or ""]
            yield finding, f"{formats.get(form, form)} weights"
        elif finding.op_type in OF_STATES or "states" in facts_named(rule):
            yield finding, "states"
        else:
            yield finding, "streams" if rule.scope == "feature" else ""


def _of_function(planned: PlannedFunction, rule: Rule) -> Concern:
    """A rule that is about a function, or about its package as a whole."""
    shard, function = planned.shard, planned.function
    if facts_named(rule) & OF_PACKAGE:
        return replace(_concern(shard.kind, rule), function_bytes=shard.weight_bytes)
    always = shard.kind == "experts" and not function.experts  # beside those that are chosen
    concern = _concern("shared" if always else shard.kind, rule)
    return replace(concern, function_bytes=function.weight_bytes, tokens=(function.tokens,))


def _concern(kind: str, rule: Rule) -> Concern:
    return Concern(kind, rule.id, rule.verdict, rule.reason, rule.remedy, rule.against, rule.source)
