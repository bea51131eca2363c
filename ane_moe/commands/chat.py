"""`ane-moe chat`: a conversation with a conversion."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ane_moe.commands.options import (
    AdapterName,
    AsJson,
    Concurrency,
    ExpertCacheMb,
    MemoryMb,
    PrecisionName,
    Predictor,
    RuntimeName,
    Seed,
    Shards,
    Temperature,
    TopP,
)
from ane_moe.errors import UserError

if TYPE_CHECKING:
    from ane_moe.loop.conversations import Conversations
    from ane_moe.loop.dialogue import Dialogue, Turn

HELP = """/system TEXT  instruct the assistant from here on (without TEXT: no longer)
/reset        forget what was said
/save FILE    write what was said, as JSON
/figures      where the time went
/quit         end (so does Ctrl-D; Ctrl-C ends an answer)
//TEXT        say /TEXT"""
PROMPT = "> "


def chat(
    out: Shards,
    system: Annotated[str | None, typer.Option(help="Instruct the assistant.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="New tokens of an answer at most.", show_default="the context"),
    ] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    adapter: AdapterName = None,
    runtime: RuntimeName = "auto",
    precision: PrecisionName = "fp32",
    expert_cache_mb: ExpertCacheMb = None,
    memory_mb: MemoryMb = None,
    concurrency: Concurrency = 1,
    predictor: Predictor = "auto",
    as_json: AsJson = False,
) -> None:
    """Talk with the shards in OUT, by the checkpoint's chat template.

    On a terminal /help says what else can be typed. In a pipe each line is a message, and answers
    alone go to stdout; with --json each is an object on a line. What was said stays in the cache:
    a turn takes in what is new. Once the context leaves no room for an answer, the oldest messages
    are left out until half of it is free.
    """
    from ane_moe.demo.shards import shards_of
    from ane_moe.loop.conversations import Conversations
    from ane_moe.loop.dialogue import Dialogue
    from ane_moe.loop.generation import GenerateOptions
    from ane_moe.loop.opened import open_model

    model = open_model(
        shards_of(out, _say),
        runtime,
        precision,
        expert_cache_mb=expert_cache_mb,
        memory_mb=memory_mb,
        adapter=adapter,
    )
    shards, tokenizer = model.shards, model.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{out} has no tokenizer", "the checkpoint had none", "use generate --prompt-ids"
        )
    options = GenerateOptions(max_tokens or shards.manifest.context, temperature, top_p, seed)
    conversations = Conversations(shards, concurrency=concurrency, predictor=predictor)
    talk = Talk(Dialogue(conversations, tokenizer, options, system), conversations, as_json)
    if talk.dialogue.form.is_plain:
        _say("the tokenizer has no chat template: messages go as a plain transcript")
    talk.run()


@dataclass
class Talk:
    """Reads lines and shows answers, until there are no more."""

    dialogue: "Dialogue"
    conversations: "Conversations"
    as_json: bool = False
    in_view: bool = field(default_factory=lambda: sys.stdin.isatty())

    def run(self) -> None:
        if self.in_view:
            _say("/help says what can be typed")
        for line in _lines(self.in_view):
            try:
                if not self._line(line):
                    return
            except UserError as error:
                if not self.in_view:
                    raise
                _say(str(error))

    def _line(self, line: str) -> bool:
        """Do what a line says; whether to go on."""
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: typer.echo(HELP, err=True),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/figures": self._figures,
        }
        if name == "/quit":
            return False
        if name in commands:
            commands[name](rest.strip())
        elif line.startswith("/") and not line.startswith("//"):
            raise UserError("there is no such command", name, "/help says which there are")
        elif line.strip():
            self._answer(line.removeprefix("/"))
        return True

    def _answer(self, text: str) -> None:
        left_out = self.dialogue.left_out
        with _interruptions() as interrupted:
            turn = self.dialogue.ask(text, interrupted)
            if self.dialogue.left_out > left_out:
                said = f"the oldest {self.dialogue.left_out} messages are left out"
                _say(f"the context is full: {said}")
            try:
                for piece in turn.generation:
                    if not self.as_json:
                        _show(piece.text)
                    if interrupted():
                        break
            finally:
                result = turn.generation.result()
                self.dialogue.answered(result.text)
        if self.as_json:
            typer.echo(json.dumps(_as_json(turn, self.dialogue.left_out)))
        else:
            typer.echo()
        if result.finish_reason == "context":
            _say("the context is full: the answer ends here")

    def _reset(self, _: str) -> None:
        self.dialogue.reset()

    def _system(self, text: str) -> None:
        self.dialogue.system = text or None

    def _save(self, name: str) -> None:
        from ane_moe.files import write_named_by_user

        if not name:
            raise UserError("/save needs the name of a file", do="/save talk.json")
        said = [asdict(message) for message in self.dialogue.transcript]
        write_named_by_user(Path(name), json.dumps(said, indent=1, ensure_ascii=False) + "\n")
        _say(f"{len(said)} messages in {name}")

    def _figures(self, _: str) -> None:
        from ane_moe.loop.figures import figures_line

        typer.echo(figures_line(self.conversations.figures), err=True)


def _as_json(turn: "Turn", left_out: int) -> dict[str, object]:
    result = turn.generation.result()
    return {
        "content": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": turn.prompt_tokens,
        "cached_tokens": turn.taken,
        "completion_tokens": len(result.ids),
        "left_out_messages": left_out,
    }


def _lines(in_view: bool) -> Iterator[str]:
    """What is typed, with the means to edit it where there are some; or the lines of a pipe."""
    if not in_view:
        yield from (_decoded(line).rstrip("\r\n") for line in sys.stdin.buffer)
        return
    if sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            yield input(PROMPT) if sys.stdout.isatty() else _typed()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return


def _typed() -> str:
    """A line that is asked for beside an output that goes elsewhere."""
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\n")


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError("stdin is not UTF-8 text", str(error)) from None


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is noted and the next one ends the program."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _show(text: str) -> None:
    """Text of the model, which must not drive a terminal."""
    from ane_moe.mlprogram.printer import printable

    if sys.stdout.isatty():
        text = "".join(one if one in "\n\t" else printable(one) for one in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    typer.echo(f"ane-moe: {line}", err=True)
