"""What verify returns: plain dataclasses, named as in the JSON document."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ane_moe.original.ranges import LayerRange, needed_divisor
from ane_moe.original.tokenizer_record import Difference
from ane_moe.verification.engine_result import EngineReport


@dataclass(frozen=True)
class ShardResult:
    """One function of one shard against the golden, over `tokens` tokens.

    All figures but `max_abs_error` are of the delta (of the logits for `lm_head`, of the rows for
    `embed`). The attainable figures are a perfect shard's: its fp16 output rounds `x + delta`,
    which costs a small delta on a large x dearly. The margins are what is left to the limits once
    that is allowed for; below 0 the row fails. For a part of a split layer the figures are those of
    the sum of its parts. `near_tie_flips` tokens were left out of a MoE shard's figures: routed
    otherwise where the golden was all but undecided. `reason` says why a row failed.
    """

    path: str
    kind: str
    layer: int | None
    function: str
    tokens: int
    min_cosine: float
    max_relative_l2: float
    passed: bool
    reason: str | None = None
    near_tie_flips: int = 0
    cosine: float | None = None
    attainable_cosine: float | None = None
    margin: float | None = None
    worst_token_cosine: float | None = None
    relative_l2: float | None = None
    attainable_relative_l2: float | None = None
    relative_l2_margin: float | None = None
    max_abs_error: float | None = None


@dataclass(frozen=True)
class RoutingResult:
    """One MoE layer: the share of tokens whose experts are exactly the golden's, and probability
    outside the top k.

    `mass_outside_top_k` is the model's own: what the router gives to experts it does not choose
    (what soft routing adds wrongly). `gate_mass_outside_top_k` is the share of the shard's gates on
    experts the model did not choose. `near_tie_flips` of the tokens that disagree do so where the
    model's choice hung on less than fp16 resolves.
    """

    layer: int
    tokens: int
    set_agreement: float
    mass_outside_top_k: float
    gate_mass_outside_top_k: float
    near_tie_flips: int


@dataclass(frozen=True)
class Divergence:
    """The first token the shards would choose otherwise, and by how much (in logits) the golden
    preferred its own."""

    prompt: int
    position: int
    golden: int
    shards: int
    golden_margin: float


@dataclass(frozen=True)
class FunctionModelResult:
    """The whole model through one kind of function, teacher-forced; KL in nats, golden against
    shards. Of a token classifier, the highest score is a label's: `label_agreement` is the share of
    tokens that both give the same one, as `top1_agreement` is, and `span_agreement` F1 of the
    shards' decoded spans against the golden's (None: there are none, or labels are not BIOES)."""

    function: str
    tokens: int
    top1_agreement: float
    mean_kl: float
    perplexity_golden: float | None
    perplexity_shards: float | None
    logit_cosine: float
    worst_logit_cosine: float
    first_differing_greedy_token: Divergence | None
    min_logit_cosine: float
    passed: bool
    label_agreement: float | None = None
    span_agreement: float | None = None

    @property
    def of_labels(self) -> bool:
        """Whether its scores are a token classifier's."""
        return self.label_agreement is not None


@dataclass(frozen=True)
class TokenizerResult:
    """The conversion's tokenizer against the checkpoint's, over `texts` texts (a chat message is
    one of them).

    `against` says where the checkpoint's ids are from: "record" (kept by the conversion) or
    "checkpoint" (read now). `reason` says why it failed.
    """

    texts: int
    against: str
    passed: bool
    differences: tuple[Difference, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file, found before any number was computed."""

    path: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """The functions, the routing and the whole model against one golden."""

    shards: tuple[ShardResult, ...] = ()
    routing: tuple[RoutingResult, ...] = ()
    models: tuple[FunctionModelResult, ...] = ()

    @property
    def failures(self) -> int:
        """Gates that failed."""
        rows: tuple[ShardResult | FunctionModelResult, ...] = (*self.shards, *self.models)
        return sum(not row.passed for row in rows)


@dataclass(frozen=True)
class Sample:
    """What `--quick` looked at, of how much: layers, prompts, and packages by path. Files of other
    packages were asked for, not read; of a layer's expert functions the first, the middle and the
    last were called one by one.

    `layers_skipped`: the golden's layers follow each other without those between them, so that the
    inputs are hidden states of the model, but not those it would have there.
    """

    layers: tuple[int, ...]
    of_layers: int
    prompts: int
    of_prompts: int
    packages: tuple[str, ...]
    of_packages: int
    layers_skipped: bool


@dataclass(frozen=True)
class VerifyReport:
    """`models` is empty, and `model_skipped` says why, when the whole model could not be run;
    `tokenizer` is None, and `tokenizer_skipped` says why, when there are no ids to compare with.

    The results are against the original model. For compressed weights `as_stored` is against the
    same model with the weights that the packages hold: what fails there was converted wrongly, what
    fails only here is lost to compression. `compression` has bits and errors by role (see
    `Manifest.compression`).

    `sample` says what was looked at where that was not all. `reused_steps` were proved by an equal
    run that was broken off. `engine` is there where the results are by the engine's arithmetic.

    `ranges` are how large the golden's hidden states get in the conversion, times the
    `stream_scale` that it has folded in; with a `stream_divisor` they would stay well within what
    fp16 and the engine hold.
    """

    passed: bool
    folder: str
    runtime: str
    routing_mode: str
    weights: str
    compressed: bool
    golden_tokens: int
    integrity: tuple[Problem, ...] = ()
    shards: tuple[ShardResult, ...] = ()
    routing: tuple[RoutingResult, ...] = ()
    models: tuple[FunctionModelResult, ...] = ()
    model_skipped: str | None = None
    as_stored: Comparison | None = None
    compression: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: TokenizerResult | None = None
    tokenizer_skipped: str | None = None
    sample: Sample | None = None
    reused_steps: int = 0
    engine: EngineReport | None = None
    stream_scale: float = 1.0
    ranges: tuple[LayerRange, ...] = ()

    @property
    def stream_divisor(self) -> int:
        """What the model's own hidden states had to be divided by."""
        return needed_divisor(self.ranges, self.stream_scale)

    @property
    def failures(self) -> int:
        """Gates that failed, problems with files included."""
        tokenizer = int(self.tokenizer is not None and not self.tokenizer.passed)
        overflowing = len(self.engine.overflowing) if self.engine else 0
        return len(self.integrity) + self._model_failures + tokenizer + overflowing

    @property
    def _model_failures(self) -> int:
        against_original = Comparison(self.shards, self.routing, self.models).failures
        return against_original + (self.as_stored.failures if self.as_stored else 0)

    @property
    def cause(self) -> str | None:
        """What is to blame for failures: "files", "conversion", "compression", "tokenizer" (it
        alone), "engine" (its arithmetic alone), or "unknown" (not told apart)."""
        if self.integrity:
            return "files"
        if not self.failures:
            return None
        if self.tokenizer is not None and not self.tokenizer.passed and not self._model_failures:
            return "tokenizer"
        if self.engine and not self.engine.exact_failures:
            return "engine"
        if self.as_stored is None:
            return "unknown" if self.compressed else "conversion"
        return "conversion" if self.as_stored.failures else "compression"

    def as_json(self) -> dict[str, Any]:
        """The document of `--json`: `model` is the path that covers most tokens,
        `model_by_function` has all."""
        document = json_numbers(asdict(self))
        by_function = {entry.pop("function"): entry for entry in document.pop("models")}
        widest = max(by_function.values(), key=lambda entry: entry["tokens"], default=None)
        return document | {
            "model": widest,
            "model_by_function": by_function,
            "failures": self.failures,
            "cause": self.cause,
            "stream_divisor": self.stream_divisor,
        }


def json_numbers(value: Any) -> Any:
    """JSON has no NaN and no Infinity: they become null."""
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
