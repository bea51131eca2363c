"""`ane-moe serve`: a conversion behind OpenAI's API."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_moe.commands.options import (
    AdapterName,
    Concurrency,
    ExpertCacheMb,
    MemoryMb,
    PrecisionName,
    Predictor,
    RuntimeName,
    Shards,
)
from ane_moe.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ane_moe.manifest import Manifest
    from ane_moe.serve.model import Served

NEEDED = ("starlette", "uvicorn", "prometheus_client")

Host = Annotated[
    str, typer.Option(help="Address to listen on; any but this machine's needs --api-key.")
]
Port = Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)]
ApiKey = Annotated[
    str | None,
    typer.Option(help="What clients have to know.", envvar="ANE_MOE_API_KEY", metavar="KEY"),
]
Name = Annotated[
    str | None, typer.Option(help="What clients call the model.", show_default="the folder's")
]
Waiting = Annotated[int, typer.Option(help="Requests in the queue at most.", min=0)]
Conversations = Annotated[
    int,
    typer.Option(help="Conversations whose caches are kept, each with memory of its own."),
]
MaxBodyMb = Annotated[float, typer.Option(help="MB (10^6 bytes) of a request.")]
Grace = Annotated[float, typer.Option(help="Seconds that answers have to end in at shutdown.")]


def serve(
    out: Shards,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    name: Name = None,
    waiting: Waiting = 64,
    conversations: Conversations = 4,
    max_body_mb: MaxBodyMb = 4.0,
    grace: Grace = 30.0,
    adapter: AdapterName = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    expert_cache_mb: ExpertCacheMb = None,
    memory_mb: MemoryMb = None,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
) -> None:
    """Serve the shards in OUT: /v1/chat/completions, /v1/completions, or /v1/redact for a privacy
    filter; a page at /, /v1/models, /figures, /report, /healthz, /metrics.

    Needs `pip install 'ane-moe[serve]'`. One request runs at a time, others wait in a queue, and a
    client that goes away ends its own. Ctrl-C and SIGTERM end the server when answers are done.
    """
    _require_installed()
    from ane_moe.demo.shards import shards_of
    from ane_moe.serve.app import Limits, Server
    from ane_moe.serve.guard import Rules
    from ane_moe.serve.listening import address_of, bind, host_names, is_loopback, listen
    from ane_moe.serve.report import report_of

    if not is_loopback(host) and not api_key:
        raise UserError(
            f"{host} is reached from other machines",
            "no --api-key",
            "give one, or leave --host out",
        )
    folder = shards_of(out, _say)
    bound = bind(host, port)
    model = _opened(
        folder,
        conversations,
        runtime,
        precision,
        adapter=adapter,
        expert_cache_mb=expert_cache_mb,
        memory_mb=memory_mb,
        concurrency=concurrency,
        predictor=predictor,
    )
    called = name or (out.name if out != folder else folder.resolve().name)
    rules = Rules(host_names(host), api_key)
    limits = Limits(waiting, int(max_body_mb * 1_000_000))
    server = Server(model, called, lambda: report_of(folder), rules, limits)
    address = address_of(bound)

    def ready() -> None:
        _say(f"{called} at {address}/v1 for clients, {address}/ for people")

    listen(server.app, bound, grace, ready)
    _say("ended")


def _opened(
    folder: Path,
    conversations: int,
    runtime: str,
    precision: str,
    *,
    adapter: str | None,
    expert_cache_mb: float | None,
    memory_mb: float | None,
    concurrency: int,
    predictor: str,
) -> "Served":
    """The model in `folder`, of whatever kind it is."""
    from ane_moe.loop.conversations import Conversations
    from ane_moe.loop.opened import open_model
    from ane_moe.manifest import read_manifest
    from ane_moe.serve.model import LanguageModel

    manifest = read_manifest(folder)
    if manifest.labels:
        of_decoders = {
            "--adapter": adapter is not None,
            "--precision": precision != "fp32",
            "--expert-cache-mb": expert_cache_mb is not None,
            "--memory-mb": memory_mb is not None,
            "--predictor": predictor != "auto",
        }
        return _privacy_filter(folder, manifest, runtime, of_decoders)
    opened = open_model(
        folder,
        runtime,
        precision,
        adapter=adapter,
        expert_cache_mb=expert_cache_mb,
        memory_mb=memory_mb,
    )
    if opened.tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer",
            "the checkpoint had none",
            "convert again with its tokenizer.json beside the weights",
        )
    kept = Conversations(opened.shards, conversations, concurrency=concurrency, predictor=predictor)
    model = LanguageModel(kept, opened.tokenizer)
    if model.form.is_plain:
        _say("the tokenizer has no chat template: messages go as a plain transcript")
    return model


def _privacy_filter(
    folder: Path, manifest: "Manifest", runtime: str, of_decoders: "Mapping[str, bool]"
) -> "Served":
    """Raises UserError for options `of_decoders` that are given."""
    from ane_moe.redaction.redactor import open_redactor
    from ane_moe.redaction.viterbi import read_biases
    from ane_moe.serve.model import PrivacyFilter

    if unused := [name for name, is_given in of_decoders.items() if is_given]:
        raise UserError("a privacy filter is not served with that", unused[0], "leave it out")
    redactor = open_redactor(folder, runtime=runtime)
    return PrivacyFilter(redactor, manifest, read_biases(folder))


def _require_installed() -> None:
    """Raise UserError where the extra is not installed."""
    from importlib.util import find_spec

    if lacking := [module for module in NEEDED if find_spec(module) is None]:
        raise UserError(
            "serving needs other packages", f"no {lacking[0]}", "pip install 'ane-moe[serve]'"
        )


def _say(line: str) -> None:
    typer.echo(f"ane-moe: {line}", err=True)
