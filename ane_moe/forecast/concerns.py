"""What the placement rules say of a conversion before a package exists: of formats, states, sizes.

Every concern is a rule of `rules.toml` that holds for the facts of what would be written; no rule
is known by name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ane_moe.conversion.plan import CACHE_STEP, ConvertOptions
from ane_moe.forecast.pieces import Piece
from ane_moe.forecast.workload import Workload
from ane_moe.formats.stored_form import stored_form
from ane_moe.placement.rules import Rule, rule_book
from ane_moe.placement.targets import Target

# What the graphs of a kind have beside sizes, as far as rules ask for it: operations (those of the
# built-in model; a test counts them), projections that read one value (at least four experts are
# packed, each with gate and up), functions of a package (decode and prefill).
GRAPHS: dict[str, dict[str, int]] = {
    "attn": {"ops": 90, "package_functions": 2},
    "moe": {"ops": 99, "package_functions": 2, "parallel_projections": 8},
    "dense": {"ops": 14, "package_functions": 2},
    "experts": {"ops": 7},
    "shared": {"ops": 7},
    "lm_head": {"ops": 10, "package_functions": 2},
}
STATES_OF_A_LAYER = 2  # keys and values
OPSET = 18  # packages are for iOS 18 and macOS 15


@dataclass(frozen=True)
class Concern:
    """A placement rule that a kind of function, a weight format or the states would meet.

    verdict: cpu (off the engine) or uncertain; `against`: evidence of the contrary.
    `function_bytes`: the weights of what it is about, where sizes decide.
    """

    kind: str
    rule: str
    verdict: str
    reason: str
    remedy: str
    against: str
    source: str
    function_bytes: int | None = None

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


def concerns_of_options(options: ConvertOptions, target: Target) -> tuple[Concern, ...]:
    """What speaks against the weight formats, states and layout that `options` ask for."""
    book = rule_book(target)

    def met(kind: str, scope: str, facts: dict[str, Any]) -> Iterator[Concern]:
        rules = book.matching(scope, _package_facts() | facts)
        return (_concern(kind, rule) for rule in rules if rule.verdict != "ane")

    found: list[Concern] = []
    for name in options.recipe.formats:
        found += met(f"{name} weights", "op", _weight_facts(name))
    for scope, facts in _state_facts(options):
        found += met("states", scope, facts)
    for facts in _stream_facts(options):
        found += met("streams", "feature", facts)
    return distinct(found)


def concerns_of_sizes(
    workload: Workload, pieces: Iterable[Piece], target: Target
) -> tuple[Concern, ...]:
    """What speaks against the sizes of packages and functions, a rule once for a kind of them."""
    book = rule_book(target)
    found: list[Concern] = []
    for call in workload.decode:
        sizes = {"weight_bytes": call.stored_bytes, "flops": 2 * call.weights}
        rule = next(book.matching("segment", GRAPHS[call.kind] | sizes))
        found += [_concern(call.kind, rule, call.stored_bytes)] if rule.verdict != "ane" else []
    for piece in pieces:
        size = piece.stored_bytes // piece.packages
        sizes = {"weight_bytes": size, "weight_file_bytes": size} | _functions(piece)
        rules = book.matching("function", _package_facts() | GRAPHS[piece.kind] | sizes)
        found += [_concern(piece.kind, rule, size) for rule in rules if rule.verdict != "ane"]
    return distinct(found)


def distinct(concerns: Iterable[Concern]) -> tuple[Concern, ...]:
    """The first of each kind and rule."""
    first: dict[tuple[str, str], Concern] = {}
    for concern in concerns:
        first.setdefault(concern.key, concern)
    return tuple(first.values())


def _concern(kind: str, rule: Rule, size: int | None = None) -> Concern:
    return Concern(
        kind, rule.id, rule.verdict, rule.reason, rule.remedy, rule.against, rule.source, size
    )


def _package_facts() -> dict[str, Any]:
    return {
        "converter": version("coremltools"),
        "opset": OPSET,
        "enumerated": False,
        "widest_range": 1,
    }


def _weight_facts(name: str) -> dict[str, Any]:
    """Of a convolution that reads weights in the format called `name`."""
    return {
        "op": "conv",
        "nested": False,
        "rank": 4,
        "input_rank": 4,
        "dtypes": frozenset({"fp16"}),
        "constants": frozenset({"weight"}),
        "weight_format": stored_form(name),
    }


def _state_facts(options: ConvertOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the caches: as states of a function, and of the operations that read and write them."""
    if options.state != "mlstate":
        return
    yield "function", {"states": STATES_OF_A_LAYER * options.layers_per_shard}
    yield (
        "feature",
        {"role": "state", "name": "", "dtype": "fp16", "rank": 4, "last_axis": CACHE_STEP},
    )
    for operation in ("read_state", "write_state"):
        yield "op", {"op": operation, "nested": False, "rank": 4, "dtypes": frozenset({"fp16"})}


def _stream_facts(options: ConvertOptions) -> Iterator[dict[str, Any]]:
    """Of the streams between functions: channels (more than one), tokens where the layout says."""
    for tokens in {1, options.prefill or 1}:
        height, width = (1, tokens) if options.layout == "bc1s" else (tokens, 1)
        yield {
            "role": "input",
            "name": "",
            "dtype": "fp16",
            "rank": 4,
            "n": 1,
            "c": 2,
            "h": height,
            "w": width,
            "last_axis": width,
        }


def _functions(piece: Piece) -> dict[str, int]:
    """How many functions a package of expert functions has."""
    if piece.experts is None:
        return {}
    functions = piece.experts.functions * len(piece.experts.tokens)
    return {"package_functions": functions // piece.packages}
