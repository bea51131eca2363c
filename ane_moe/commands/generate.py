"""`ane-moe generate`: text out of a conversion."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

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
)
from ane_moe.errors import UserError

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
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue, UTF-8.")
    ] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids to continue, as 1,2,3.")] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings to continue in place of a text's: floats (tokens, width).",
            metavar="FILE.npy",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the checkpoint's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that add up to this.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    adapter: AdapterName = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    expert_cache_mb: ExpertCacheMb = None,
    expert_policy: ExpertPolicy = "layer-distance",
    memory_mb: MemoryMb = None,
    direct: Direct = False,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
    ahead: Annotated[
        int | None,
        typer.Option(
            help="Guess the experts of so many layers ahead.",
            min=1,
            show_default="1, or as far as shards guess",
        ),
    ] = None,
    ahead_if_it_pays: Annotated[
        bool,
        typer.Option(
            "--ahead-if-it-pays",
            help="Load guessed experts only where that is expected to take less time.",
        ),
    ] = False,
    contention: Annotated[
        float | None,
        typer.Option(
            help="ahead-if-it-pays: computing takes 1 + this as long meanwhile.",
            min=0,
            show_default="0.73",
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="What `ane-moe align` fitted to this conversion.",
            metavar="FILE.npz",
            show_default=False,
        ),
    ] = None,
    self_speculate: Annotated[
        int | None,
        typer.Option(
            help="Draft so many tokens by the first layers, and check them in one call.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(
            help="self-speculate: draft by the layers up to this one.",
            show_default="a quarter of them",
        ),
    ] = None,
    pin_experts: Annotated[
        int | None,
        typer.Option(
            help="CHANGES THE MODEL: after the prompt use only the experts that it chose most, so "
            "many in a layer.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    pin_every: Annotated[
        int | None,
        typer.Option(
            help="pin-experts: choose them anew after so many tokens.", show_default="never"
        ),
    ] = None,
    roster: Annotated[
        int | None,
        typer.Option(
            help="Take each token this many times, by experts chosen with noise, and average.",
            metavar="N",
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="roster: what the noise is multiplied by.", show_default="0.1"),
    ] = None,
    tau_schedule: Annotated[
        Path | None,
        typer.Option(help='roster: the same by layer, as {"0": 0.1}.', metavar="FILE.json"),
    ] = None,
    skip_layers: Annotated[
        int, typer.Option(help="roster: no noise in so many first and last layers.", metavar="L")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout at the end.")
    ] = False,
) -> None:
    """Continue a prompt with the shards in OUT.

    Text goes to stdout as it comes, a line of figures to stderr at the end. The prompt is read from
    stdin when none is given. Without a tokenizer, ids go in (--prompt-ids) and come out. A last
    token of white space is taken back, and the first new one must begin with it.
    """
    from ane_moe.early_adapters import read_adapters
    from ane_moe.loop.ahead_rule import CONTENTION
    from ane_moe.loop.embeddings_file import read_embeddings
    from ane_moe.loop.figures import figures_dict, figures_line
    from ane_moe.loop.generation import GenerateOptions
    from ane_moe.loop.generation import generate as start
    from ane_moe.loop.opened import open_model
    from ane_moe.loop.pinning import PinnedSession, PinOptions
    from ane_moe.loop.prefetch import Guessing, settled
    from ane_moe.loop.roster import TAU, RosterOptions, RosterSession, read_schedule
    from ane_moe.loop.session import Session
    from ane_moe.loop.speculation import SpeculationOptions, SpeculativeSession

    _require_one(prompt, prompt_file, prompt_ids, embeddings)
    numbered = prompt_ids is not None or embeddings is not None
    text = None if numbered else _prompt_text(prompt, prompt_file)
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
    shards, tokenizer = model.shards, model.tokenizer
    width = shards.manifest.d_model
    rows = None if embeddings is None else read_embeddings(embeddings, width)
    if text is None:
        ids = [] if prompt_ids is None else _parse_ids(prompt_ids)
    elif tokenizer is None:
        from ane_moe.hub.fetched import shown

        raise UserError(
            f"{shown(out)} has no tokenizer", "the checkpoint had none", "give --prompt-ids 1,2,3"
        )
    else:
        ids = tokenizer.encode_chat(text) if chat else tokenizer.encode(text)
    fitted = None if adapters is None else read_adapters(adapters, width)
    ways = {
        "--self-speculate": self_speculate is not None,
        "--pin-experts": pin_experts is not None,
        "--roster": roster is not None,
        "--predictor": predictor not in ("auto", "none"),
    }
    _require_alone(sum(ways.values()))
    rule = CONTENTION if contention is None else contention
    guessing = Guessing(predictor, ahead, fitted, ahead_if_it_pays, rule)
    way = next((option for option, is_given in ways.items() if is_given), None)
    guesses = way in (None, "--predictor")
    guessed_by = settled(guessing, shards.manifest).predictor if guesses else "none"
    _require_used(
        {
            "--ahead": ahead is not None,
            "--ahead-if-it-pays": ahead_if_it_pays,
            "--contention": contention is not None,
            "--adapters": adapters is not None,
            "--exit-layer": exit_layer is not None,
            "--pin-every": pin_every is not None,
            "--tau": tau is not None,
            "--tau-schedule": tau_schedule is not None,
            "--skip-layers": skip_layers != 0,
        },
        {
            **ways,
            "--predictor": guessed_by != "none",
            "--predictor adapter": guessed_by == "adapter",
        },
        f"guesses by: {guessed_by}" if guesses else f"with {way}",
    )
    session: Session
    if self_speculate is not None:
        drafting = SpeculationOptions(self_speculate, exit_layer)
        session = SpeculativeSession(shards, drafting, fitted, concurrency=concurrency)
    elif pin_experts is not None:
        pins = PinOptions(pin_experts, pin_every)
        session = PinnedSession(shards, pins, concurrency=concurrency)
    elif roster is None:
        session = Session(shards, concurrency=concurrency, predictor=guessing)
    else:
        schedule = {} if tau_schedule is None else read_schedule(tau_schedule)
        how = RosterOptions(roster, TAU if tau is None else tau, schedule, skip_layers, seed)
        session = RosterSession(shards, how, concurrency=concurrency)
    options = GenerateOptions(max_tokens, temperature, top_p, seed, tuple(stop or ()))
    begun = (
        tokenizer.heal(ids, shards.manifest.vocab)
        if tokenizer and text is not None and not chat
        else None
    )
    given, decode = ids[:-1] if begun else ids, tokenizer.decode if tokenizer else None
    generation = start(session, given, options, decode, begun, rows)
    try:
        for piece in generation:
            if not as_json:
                _show(piece.text if tokenizer else f"{piece.id} ")
    except KeyboardInterrupt:
        pass  # a wish to end: what came so far is the result
    result = generation.result()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "prompt_ids": result.prompt_ids,
                    "ids": result.ids,
                    "text": result.text,
                    "finish_reason": result.finish_reason,
                    "figures": figures_dict(result.figures),
                }
            )
        )
    else:
        typer.echo()
        typer.echo(f"{figures_line(result.figures)}; ended by: {result.finish_reason}", err=True)


def _require_one(*prompts: object) -> None:
    if sum(prompt is not None for prompt in prompts) > 1:
        raise UserError(
            "the prompt is given more than once",
            "",
            "use one of --prompt, --prompt-file, --prompt-ids, --embeddings",
        )


def _require_alone(ways: int) -> None:
    if ways > 1:
        raise UserError(
            "there is more than one way to take tokens",
            do="use one of --predictor, --self-speculate, --pin-experts, --roster",
        )


def _require_used(given: Mapping[str, bool], active: Mapping[str, bool], found: str) -> None:
    """Raise UserError for an option that would do nothing, by what else is given or `active`."""
    for option, needed in NEEDS.items():
        if given[option] and not any(active.get(one) or given.get(one) for one in needed):
            raise UserError(
                f"{option} would do nothing",
                found,
                f"give {' or '.join(needed)}, or leave it out",
            )


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the place that was named, stdin when none was."""
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt", "", "give --prompt, --prompt-file or --prompt-ids, or pipe it in"
        )
    try:
        return (
            sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()
        ).decode()
    except OSError as error:
        raise UserError(f"{prompt_file} cannot be read", str(error.strerror)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{prompt_file or 'stdin'} is not UTF-8 text", str(error)) from None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            "--prompt-ids is not a list of ids", repr(text), "write it as 1,2,3"
        ) from None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
