"""`ane-moe generate`: text out of a conversion."""

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from ane_moe.commands import generate_options as option
from ane_moe.commands.options import (
    AdapterName,
    Concurrency,
    Direct,
    ExpertCacheMb,
    ExpertPolicy,
    MemoryMb,
    Out,
    PrecisionName,
    Predictor,
    RuntimeName,
    Seed,
    Temperature,
    TopP,
)
from ane_moe.errors import UserError

if TYPE_CHECKING:
    from ane_moe.loop.generation import GenerateResult, Generation
    from ane_moe.loop.ways import Way

# What an option is of: one of these has to be given, or to hold without.
NEEDS = {
    "--ahead": ("--predictor",),
    "--ahead-if-it-pays": ("--predictor",),
    "--contention": ("--ahead-if-it-pays",),
    "--adapters": ("--predictor adapter", "--self-speculate"),
    "--exit-layer": ("--self-speculate",),
    "--pin-every": ("--pin-experts",),
    "--tau": ("--roster",),
    "--tau-schedule": ("--roster",),
    "--skip-layers": ("--roster",),
}


def generate(
    out: Out,
    prompt: option.Prompt = None,
    prompt_file: option.PromptFile = None,
    prompt_ids: option.PromptIds = None,
    embeddings: option.Embeddings = None,
    chat: option.Chat = False,
    max_tokens: option.MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: option.Stop = None,
    adapter: AdapterName = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    expert_cache_mb: ExpertCacheMb = None,
    expert_policy: ExpertPolicy = "layer-distance",
    memory_mb: MemoryMb = None,
    direct: Direct = False,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
    ahead: option.Ahead = None,
    ahead_if_it_pays: option.AheadIfItPays = False,
    contention: option.Contention = None,
    adapters: option.Adapters = None,
    self_speculate: option.SelfSpeculate = None,
    exit_layer: option.ExitLayer = None,
    pin_experts: option.PinExperts = None,
    pin_every: option.PinEvery = None,
    roster: option.Roster = None,
    tau: option.Tau = None,
    tau_schedule: option.TauSchedule = None,
    skip_layers: option.SkipLayers = 0,
    as_json: option.AsJson = False,
) -> None:
    """Continue a prompt with the shards in OUT.

    Text goes to stdout as it comes, a line of figures to stderr at the end. The prompt is read from
    stdin when none is given. Without a tokenizer, ids go in (--prompt-ids) and come out. A last
    token of white space is taken back, and the first new one must begin with it.
    """
    from ane_moe.commands.prompt import PromptOptions
    from ane_moe.early_adapters import read_adapters
    from ane_moe.loop.ahead_rule import CONTENTION
    from ane_moe.loop.generation import GenerateOptions
    from ane_moe.loop.generation import generate as begin
    from ane_moe.loop.opened import open_model
    from ane_moe.loop.pinning import PinOptions
    from ane_moe.loop.prefetch import Guessing, settled
    from ane_moe.loop.roster import TAU, RosterOptions, read_schedule
    from ane_moe.loop.speculation import SpeculationOptions
    from ane_moe.loop.ways import open_session

    given = PromptOptions(prompt, prompt_file, prompt_ids, embeddings, chat)
    given.require_one()
    text = given.read()
    model = open_model(
        out,
        runtime,
        precision,
        expert_cache_mb=expert_cache_mb,
        expert_policy=expert_policy,
        memory_mb=memory_mb,
        adapter=adapter,
        direct=direct,
    )
    taken, manifest = given.prompt(text, model, out), model.shards.manifest
    fitted = None if adapters is None else read_adapters(adapters, manifest.d_model)
    rule = CONTENTION if contention is None else contention
    guessing = Guessing(predictor, ahead, fitted, ahead_if_it_pays, rule)
    ways: dict[str, Way] = {}
    if self_speculate is not None:
        ways["--self-speculate"] = SpeculationOptions(self_speculate, exit_layer)
    if pin_experts is not None:
        ways["--pin-experts"] = PinOptions(pin_experts, pin_every)
    if roster is not None:
        schedule = {} if tau_schedule is None else read_schedule(tau_schedule)
        noise = TAU if tau is None else tau
        ways["--roster"] = RosterOptions(roster, noise, schedule, skip_layers, seed)
    if predictor not in ("auto", "none"):
        ways["--predictor"] = guessing
    name, way = _only(ways) or ("", guessing)
    more = {
        "--ahead": ahead is not None,
        "--ahead-if-it-pays": ahead_if_it_pays,
        "--contention": contention is not None,
        "--adapters": adapters is not None,
        "--exit-layer": exit_layer is not None,
        "--pin-every": pin_every is not None,
        "--tau": tau is not None,
        "--tau-schedule": tau_schedule is not None,
        "--skip-layers": skip_layers != 0,
    }
    _require_used(more, name, settled(way, manifest).predictor if way is guessing else None)
    session = open_session(model.shards, way, fitted, concurrency=concurrency)
    options = GenerateOptions(max_tokens, temperature, top_p, seed, tuple(stop or ()))
    decode = model.tokenizer.decode if model.tokenizer else None
    generation = begin(session, taken.ids, options, decode, taken.begun, taken.rows)
    _follow(generation, in_ids=decode is None, silent=as_json)
    _show(generation.result(), as_json)


def _only(ways: "Mapping[str, Way]") -> "tuple[str, Way] | None":
    """The way that is asked for, if any, and by which option. Raises UserError for several."""
    if len(ways) > 1:
        raise UserError(
            "there is more than one way to take tokens",
            do="use one of --predictor, --self-speculate, --pin-experts, --roster",
        )
    return next(iter(ways.items()), None)


def _require_used(given: Mapping[str, bool], way: str, predictor: str | None) -> None:
    """Raise UserError for an option that would do nothing beside this way to take tokens, and the
    predictor, where experts are guessed."""
    active, found = {way}, f"with {way}"
    if predictor is not None:
        guesses = predictor != "none"
        active = {"--predictor", f"--predictor {predictor}"} if guesses else set()
        found = f"guesses by: {predictor}"
    active |= {name for name, is_given in given.items() if is_given}
    for name, needed in NEEDS.items():
        if given[name] and not active.intersection(needed):
            raise UserError(
                f"{name} would do nothing",
                found,
                f"give {' or '.join(needed)}, or leave it out",
            )


def _follow(generation: "Generation", *, in_ids: bool, silent: bool) -> None:
    """Write what comes as it comes, until the end or Ctrl-C."""
    try:
        for piece in generation:
            if not silent:
                sys.stdout.write(f"{piece.id} " if in_ids else piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # a wish to end: what came so far is the result


def _show(result: "GenerateResult", as_json: bool) -> None:
    from ane_moe.loop.figures import figures_dict, figures_line

    if as_json:
        document = {
            "prompt_ids": result.prompt_ids,
            "ids": result.ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "figures": figures_dict(result.figures),
        }
        typer.echo(json.dumps(document))
        return
    typer.echo()
    typer.echo(f"{figures_line(result.figures)}; ended by: {result.finish_reason}", err=True)
