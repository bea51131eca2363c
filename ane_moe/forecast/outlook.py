"""What converting a model would give, before any work: sizes, calls, predicted speed and
placement."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ane_moe.addresses import address
from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.checkpoints.gguf.model import gguf_file
from ane_moe.checkpoints.hub import hub_name, local_config, local_folder
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.errors import UserError
from ane_moe.families import describe, describe_config, published, supported
from ane_moe.families.approximate import EXPERTS, approximate, names_experts
from ane_moe.forecast.chips import Range, find_chip
from ane_moe.forecast.concerns import Concern, concerns_of_plan
from ane_moe.forecast.conversion_cost import conversion_seconds
from ane_moe.forecast.cost_model import NOTE, Prediction, predict
from ane_moe.forecast.design import Design, design, routings
from ane_moe.forecast.early_cost import EarlyCost, early_cost
from ane_moe.forecast.layer_kinds import KindsPlan, plan_kinds
from ane_moe.forecast.lending_forms import LendingForms, lending_forms
from ane_moe.forecast.memory_sizes import Fit, fit
from ane_moe.forecast.stream_fit import StreamFit, best_stream, stream_fits
from ane_moe.forecast.stream_speed import ASSUMED, Reading
from ane_moe.forecast.track_forms import TrackForm, as_json, track_forms
from ane_moe.forecast.verdict import Verdict
from ane_moe.forecast.workload import Workload, workload_of_plan
from ane_moe.formats.encoders import AS_STORED
from ane_moe.formats.recipe import Recipe, find_recipe
from ane_moe.json_file import read_json
from ane_moe.model.spec import ModelSpec, Synchronisations
from ane_moe.model.weight import EMBEDDING
from ane_moe.placement.targets import DEFAULT_OS, Target, find_target

CONFIG = "config.json"
DEFAULT_RECIPE = "int8"
RECIPES = ("fp16", "int8", "small", "tiny")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")  # convert looks for, or refuses
REFUSED = "None: convert refuses this checkpoint, as the first line says."
APPROXIMATE = (
    "approximate: sizes come from the fields that families share, and are wrong where its layers "
    "hold "
    "other parts"
)
MINOR = 0.05  # of the weights that a step reads
CLOSE = 1.1  # expected speeds nearer than this factor do not decide


@dataclass(frozen=True)
class Choice:
    """One way to convert. `conversion_seconds` is None where a format was never timed."""

    routing: str
    recipe: str
    workload: Workload
    prediction: Prediction
    concerns: tuple[Concern, ...]
    conversion_seconds: Range | None
    memory: Fit  # loaded, at the upper end of what is predicted, in machines with the chip

    @property
    def stays(self) -> bool:
        """Whether no rule takes any of it off the engine, but for parts that hold few of the
        weights that a step reads: those may run where they are."""
        read = Counter[str]()
        for call in self.workload.decode:
            read[call.kind] += round(call.count.expected * call.stored_bytes)
        minor = {kind for kind, size in read.items() if size < MINOR * read.total()}
        off = (concern for concern in self.concerns if concern.verdict == "cpu")
        return all(concern.kind in minor for concern in off)


@dataclass(frozen=True)
class Outlook:
    """Every way that was asked about, and which to take. All speeds are predicted. `verdict` is the
    answer in one sentence, of a model that `convert` takes.

    `refusal`: why `convert` would not take the checkpoint, in its own words, or nothing. What it
    refuses is forecast all the same, approximately, where its config.json allows: `choices` are
    empty where it does not. `design`: what Core ML's cost decision makes of the functions, and what
    to put together.
    """

    model_type: str
    refusal: str
    target: str
    os: int
    context: int | None
    weights: int | None
    notes: tuple[str, ...]
    choices: tuple[Choice, ...]
    recommendation: str
    design: Design | None = None
    lengths: tuple[int, ...] = ()
    synchronisations: Synchronisations | None = None  # of tracks
    forms: tuple[TrackForm, ...] = ()  # of tracks, the better one first
    verdict: Verdict | None = None
    streams: tuple[StreamFit, ...] = ()  # where a limit of memory was asked about
    lending: LendingForms | None = None  # of layers that read another one's caches
    early: EarlyCost | None = None  # of experts that attention shards can guess

    @property
    def supported(self) -> bool:
        """Whether `convert` would take the checkpoint."""
        return not self.refusal

    @property
    def stream(self) -> StreamFit | None:
        """The stream to take in the memory that was asked about."""
        return best_stream(self.streams)

    @property
    def way(self) -> str:
        """Options of `convert`: those of the verdict, or of a stream where the model does not fit
        otherwise; or nothing."""
        if self.stream and self.verdict and self.verdict.memory.fits is False:
            return f"--routing stream --compress {self.stream.recipe}"
        taken = self.verdict
        return f"--routing {taken.routing} --compress {taken.recipe}" if taken else ""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data; ranges as low, expected, high."""
        return {
            "model_type": self.model_type,
            "supported": self.supported,
            "reason": self.refusal or None,
            "verdict": self.verdict and self.verdict.as_json(),
            "approximate": not self.supported,
            "target": self.target,
            "os": self.os,
            "context": self.context,
            "lengths": list(self.lengths),
            "weights": self.weights,
            "synchronisations": self.synchronisations and self.synchronisations.as_json(),
            "track_forms": as_json(self.forms),
            "streams": [fit.as_json() for fit in self.streams],
            "stream_verdict": self.stream and self.stream.sentence,
            "lending": self.lending and self.lending.as_json(),
            "early": self.early and self.early.as_json(),
            "notes": list(self.notes),
            "choices": [_choice_json(choice) for choice in self.choices],
            "recommendation": self.recommendation,
            "design": self.design.as_json() if self.design else None,
            "note": NOTE,
        }


def outlook(
    checkpoint: str | Path,
    *,
    target: str = "m4-max",
    os: int = DEFAULT_OS,
    recipes: Sequence[str] = RECIPES,
    context: int | None = None,
    prefill: int = 64,
    max_shard_mb: int = 220,
    lengths: tuple[int, ...] | None = None,
    memory_mb: float | None = None,
    reading: Reading = ASSUMED,
) -> Outlook:
    """What `convert` would make of a checkpoint folder, one at an address, a config.json, or a
    model of the Hugging Face Hub by its id.

    The configuration is read, and where a folder has weights, their names and shapes. Raises
    UserError when there is no configuration, for an unknown chip, system or format, and for a
    context that the model does not have.
    """
    if address(checkpoint):
        checkpoint = local_folder(checkpoint, ())
    values, where = read_config(checkpoint)
    folder = Path(checkpoint) if _holds_weights(Path(checkpoint)) else None
    return outlook_of(
        values,
        where,
        folder,
        target=target,
        os=os,
        recipes=recipes,
        context=context,
        prefill=prefill,
        max_shard_mb=max_shard_mb,
        lengths=lengths,
        memory_mb=memory_mb,
        reading=reading,
    )


def outlook_of(
    values: dict[str, Any],
    where: str = "config.json",
    folder: Path | None = None,
    *,
    target: str = "m4-max",
    os: int = DEFAULT_OS,
    recipes: Sequence[str] = RECIPES,
    context: int | None = None,
    prefill: int = 64,
    max_shard_mb: int = 220,
    lengths: tuple[int, ...] | None = None,
    memory_mb: float | None = None,
    reading: Reading = ASSUMED,
) -> Outlook:
    """`outlook` of a configuration that has been read; `folder` is that of its weights, if any."""
    place, model = find_target(target, os), _read_model(values, where, folder)
    spec = model.spec
    if spec is None:
        return Outlook(model.name, model.refusal, target, os, None, None, model.notes, (), REFUSED)
    shape = ConvertOptions(
        context=context, prefill=prefill, max_shard_mb=max_shard_mb, lengths=lengths
    )
    ways = list(_ways(spec, recipes, shape))
    choices = [_choice(kinds, place) for kinds in ways]
    tokens = ways[-1].plan.context if ways else None
    of_encoder = ways[-1].plan.lengths if ways else ()
    advice = REFUSED if model.refusal else recommendation(choices)
    by_default = ConvertOptions(
        context=context,
        prefill=prefill,
        max_shard_mb=max_shard_mb,
        recipe=find_recipe(DEFAULT_RECIPE),
    )
    chip = find_chip(place.name)
    early = early_cost(spec, chip)
    return Outlook(
        model.name,
        model.refusal,
        target,
        os,
        tokens,
        weights_in_shards(spec),
        model.notes,
        tuple(choices),
        advice,
        design(spec, place, context=context, prefill=prefill, lengths=lengths),
        of_encoder,
        spec.synchronisations,
        track_forms(spec, by_default, chip),
        None if model.refusal else _verdict(choices, target),
        ()
        if memory_mb is None
        else stream_fits(
            spec,
            [find_recipe(name) for name in recipes],
            memory_mb,
            chip,
            reading,
            context,
            prefill,
            early,
        ),
        lending_forms(spec, by_default, chip),
        early,
    )


def _ways(spec: ModelSpec, recipes: Iterable[str], shape: ConvertOptions) -> Iterator[KindsPlan]:
    """The plan of each way to compute experts with each recipe, in this shape otherwise. Raises
    UserError."""
    for routing in routings(spec):
        for name in recipes:
            recipe = find_recipe(name)
            _require_known(recipe)
            yield plan_kinds(spec, replace(shape, routing=routing, recipe=recipe))


@dataclass(frozen=True)
class _Model:
    """A model as far as it can be read: no `spec` where nothing can be forecast."""

    name: str
    spec: ModelSpec | None
    refusal: str = ""
    notes: tuple[str, ...] = ()


def _require_known(recipe: Recipe) -> None:
    if AS_STORED in recipe.formats:
        raise UserError(
            f"how much {recipe.name} takes is up to the tensors of the checkpoint",
            "a plan from its configuration",
            f"see `ane-moe convert CHECKPOINT OUT --dry-run --compress {recipe.name}`",
        )


def _read_model(values: dict[str, Any], where: str, folder: Path | None) -> _Model:
    """By convert's own reader; by the fields that families share where that refuses it.

    Raises convert's UserError for a model of a known family whose fields make no sense.
    """
    name = str(values.get("model_type", "unknown"))
    try:
        spec = describe(open_checkpoint(folder))[0] if folder else describe_config(values, where)
        return _Model(name, spec)
    except UserError as error:
        refused = error
    if name not in supported() and not names_experts(values):
        none = f"none of {', '.join(EXPERTS)} in {where}"
        known = f"supported: {', '.join(supported())}"
        return _Model(name, None, f"{name} is not a mixture of experts ({none}); {known}")
    try:
        near = approximate(values, where)
    except UserError as error:
        if name in supported():
            raise refused from None
        return _Model(name, None, str(refused), (f"no forecast: {error}",))
    return _Model(name, near.spec, str(refused), (APPROXIMATE, *near.notes))


def weights_in_shards(spec: ModelSpec) -> int:
    """All weights but those of the embedding, which the host reads. A router that layers share
    counts once."""
    rows = (row for name, row in spec.distinct_weights() if name != EMBEDDING)
    return sum(math.prod(row.shape) for row in rows)


def _holds_weights(folder: Path) -> bool:
    files = folder.iterdir() if folder.is_dir() else (folder,)
    return any(file.suffix in WEIGHTS for file in files)


def best_choice(choices: Iterable[Choice]) -> Choice | None:
    """The fastest that no rule takes off the engine and some machine has the memory for; of those
    as good as equal, `convert`'s default format, else the one with the most bytes, since fewer cost
    quality. None where rules take part of every one off the engine."""
    return max(
        _close(choice for choice in _fitting(choices) if choice.stays), key=_rank, default=None
    )


def recommendation(choices: Iterable[Choice]) -> str:
    """The way to take, in one sentence with the reason."""
    listed = list(choices)
    staying = [choice for choice in _fitting(listed) if choice.stays]
    best, close = best_choice(listed), _close(staying)
    if best is None:
        return (
            "None: the placement rules take part of every one off the engine; the concerns say "
            "which."
        )
    unsure = dict.fromkeys(c.rule for c in best.concerns if c.verdict == "uncertain")
    speed = _speed(best)
    preferred = (
        "convert's default format"
        if best.recipe == DEFAULT_RECIPE
        else "the least compression of these"
    )
    reason = (
        "the fastest expected"
        if len(close) == 1
        else f"within 10 % of the fastest expected, and {preferred}"
    )
    refused = [f"{choice.routing} {choice.recipe}" for choice in listed if not choice.stays]
    others = (
        f"; left out, since functions would leave the engine: {', '.join(refused)}"
        if refused
        else ""
    )
    undecided = f"placement is undecided ({', '.join(unsure)}), so verify it on a Mac first"
    doubt = f"; {undecided}{_alternative(best, staying)}" if unsure else ""
    predicted = (
        f"predicted {speed.low:.1f} to {speed.high:.1f} tok/s (expected {speed.expected:.1f})"
    )
    bound = f"bound by {best.prediction.bound}"
    return (
        f"Take --routing {best.routing} --compress {best.recipe}: {reason}, {predicted}, "
        f"{bound}{others}{doubt}."
    )


def _verdict(choices: Sequence[Choice], target: str) -> Verdict | None:
    """Of the best choice; where none stays on the engine, of the fastest that fits, and where none
    fits, of the smallest."""
    if not choices:
        return None
    best = best_choice(choices)
    chosen = best or max(_close(_fitting(choices)), key=_rank)
    if chosen.memory.fits is False:
        chosen = min(choices, key=lambda choice: choice.memory.needed_bytes)
    predicted = chosen.prediction
    return Verdict(
        target,
        chosen.routing,
        chosen.recipe,
        predicted.decode.tok_s,
        predicted.bound,
        chosen.memory,
        best is not None,
    )


def _fitting(choices: Iterable[Choice]) -> list[Choice]:
    """Those that a machine with the chip has the memory for; all, where none has."""
    listed = list(choices)
    return [choice for choice in listed if choice.memory.fits is not False] or listed


def _close(choices: Iterable[Choice]) -> list[Choice]:
    """The fastest, and those as good as equal."""
    listed = list(choices)
    fastest = max((_speed(choice).expected for choice in listed), default=0.0)
    return [choice for choice in listed if _speed(choice).expected * CLOSE >= fastest]


def _rank(choice: Choice) -> tuple[bool, int]:
    """Which of equally fast ones is preferred."""
    return choice.recipe == DEFAULT_RECIPE, choice.workload.package_bytes


def _alternative(best: Choice, staying: Iterable[Choice]) -> str:
    """The same weights by the other routing, where only the placement of single experts is what is
    in doubt."""
    experts_unsure = any(concern.kind == "experts" for concern in best.concerns)
    same = [
        choice
        for choice in staying
        if choice.recipe == best.recipe and choice.routing != best.routing
    ]
    if not (experts_unsure and same):
        return ""
    speed = _speed(same[0])
    predicted = (
        f"predicted {speed.low:.1f} to {speed.high:.1f} tok/s (expected {speed.expected:.1f})"
    )
    return f"; if its experts stay on the CPU, {same[0].routing} is {predicted}"


def read_config(checkpoint: str | Path) -> tuple[dict[str, Any], str]:
    """The configuration of a folder, a file, a Hub id or a published shape, and where it was
    read."""
    if values := published(str(checkpoint)):
        return values, str(checkpoint)
    path = Path(checkpoint)
    if gguf_file(path):
        opened = open_checkpoint(path)
        return opened.config, str(opened.config_file)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        if (name := hub_name(checkpoint)) is None:
            raise UserError(
                f"{checkpoint} has no config.json",
                do="give a model folder, its config.json, or a Hub id",
            )
        file = local_config(name)
    return read_json(file), str(file)


def _choice(kinds: KindsPlan, target: Target) -> Choice:
    plan, options = kinds.plan, kinds.plan.options
    workload = workload_of_plan(plan, kinds.repeats)
    predicted = predict(workload, find_chip(target.name))
    return Choice(
        options.routing,
        options.recipe.name,
        workload,
        predicted,
        concerns_of_plan(plan, target),
        conversion_seconds(kinds),
        fit(predicted.memory_bytes.high, target),
    )


def _speed(choice: Choice) -> Range:
    return choice.prediction.decode.tok_s


def _choice_json(choice: Choice) -> dict[str, Any]:
    work = choice.workload
    return {
        "routing": choice.routing,
        "recipe": choice.recipe,
        "disk_bytes": work.disk_bytes,
        "packages": work.packages,
        "calls_per_token": asdict(work.calls_per_token),
        "weight_bytes_per_token": asdict(work.weight_bytes_per_token),
        "prompt_multiplications_left_out": work.tail_share,
        "conversion_seconds_estimated": asdict(choice.conversion_seconds)
        if choice.conversion_seconds
        else None,
        "concerns": [asdict(concern) for concern in choice.concerns],
        "prediction": choice.prediction.as_json(),
    }
