"""Text out of a session: prefill the prompt, then sample and decode token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.figures import Figures, PhaseFigures
from ane_moe.loop.sampling import Sampler, TokenScores, token_scores
from ane_moe.loop.session import Halted, Session
from ane_moe.loop.tokenizer import Begun, Decode, TextStream


@dataclass(frozen=True)
class GenerateOptions:
    """`temperature` 0 is greedy; `stop` strings end the text before themselves and need a
    tokenizer; each piece has the scores of so many likeliest tokens, with `top_logprobs`."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """A new id and the text that became certain with it (the last piece of all may carry text
    alone)."""

    id: int | None
    text: str
    scores: TokenScores | None = None


@dataclass(frozen=True)
class GenerateResult:
    """`ids` are the new tokens, an end-of-text id included; `text` is theirs without it.

    finish_reason: eos, stop (a stop string), length (max_tokens), context (it is full),
    interrupted.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str
    figures: Figures


class Generation:
    """Iterate for pieces as they come; `result()` gives everything so far at any time."""

    def __init__(
        self,
        session: Session,
        prompt_ids: Sequence[int],
        options: GenerateOptions,
        decode: Decode | None = None,
        begun: Begun | None = None,
        embeddings: np.ndarray | None = None,
        taken: int = 0,
    ) -> None:
        if options.max_tokens < 1:
            raise UserError("max-tokens must be at least 1", str(options.max_tokens))
        if "" in options.stop:
            raise UserError("a stop string is empty", "''", "leave it out")
        if options.stop and decode is None:
            raise UserError(
                "stop strings need a tokenizer", "a conversion without one", "leave out --stop"
            )
        self._session = session
        self._prompt_ids = list(prompt_ids)
        self._taken = taken
        self._embeddings = embeddings
        self._options = options
        self._sampler = Sampler(options.temperature, options.top_p, options.seed)
        self._begun = begun
        self._stream = TextStream(decode, self._prompt_ids, options.stop, begun) if decode else None
        self._ids: list[int] = []
        self._text = ""
        self._finish_reason = "interrupted"
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    @property
    def held(self) -> list[int]:
        """The ids that the session has taken in."""
        return (self._prompt_ids + self._ids)[: self._session.position]

    def result(self) -> GenerateResult:
        return GenerateResult(
            self._prompt_ids,
            list(self._ids),
            self._text,
            self._finish_reason,
            self._session.figures,
        )

    def _run(self) -> Iterator[Piece]:
        session, figures = self._session, self._session.figures
        try:
            if self._embeddings is None:
                logits = session.prefill(self._prompt_ids[self._taken :])
            else:
                logits = session.prefill_embeddings(self._embeddings)
        except Halted:
            return
        if self._begun:
            logits = np.where(self._begun.allowed, logits, -np.inf)
        phase: PhaseFigures = figures.prefill
        while True:
            started = perf_counter()
            identifier = self._sampler.pick(logits)
            self._ids.append(identifier)
            ended = identifier in session.manifest.eos_ids
            piece = Piece(
                identifier,
                "" if ended else self._grow(identifier),
                self._scores(logits, identifier),
            )
            phase.seconds += perf_counter() - started
            yield piece
            reason = self._reason(ended)
            if reason:
                break
            logits = session.decode(identifier)
            phase = figures.decode
        self._finish_reason = reason
        if rest := self._rest():
            yield Piece(None, rest)

    def _scores(self, logits: np.ndarray, identifier: int) -> TokenScores | None:
        top = self._options.top_logprobs
        return None if top is None else token_scores(logits, identifier, top)

    def _reason(self, ended: bool) -> str:
        """Why to end now; empty to go on."""
        checks = {
            "eos": ended,
            "stop": self._stream is not None and self._stream.stopped,
            "length": len(self._ids) >= self._options.max_tokens,
            "context": self._session.room == 0,
        }
        return next((reason for reason, holds in checks.items() if holds), "")

    def _grow(self, identifier: int) -> str:
        piece = self._stream.push(identifier) if self._stream else ""
        self._text += piece
        return piece

    def _rest(self) -> str:
        piece = self._stream.finish() if self._stream else ""
        if self._stream and self._stream.stopped:
            self._finish_reason = "stop"
        self._text += piece
        return piece


def generate(
    session: Session,
    prompt_ids: Sequence[int],
    options: GenerateOptions | None = None,
    decode: Decode | None = None,
    begun: Begun | None = None,
    embeddings: np.ndarray | None = None,
    taken: int = 0,
) -> Generation:
    """Continue `prompt_ids`, or `embeddings` fp32 `(T, d)` in their place; `decode` turns ids into
    text (without it the text stays empty). The first new token completes the one that was `begun`.
    The session has taken in the first `taken` ids before.

    Raises UserError at once for senseless options, and from the iteration for a prompt that is
    empty, has ids outside the vocabulary or does not fit into the context.
    """
    chosen = options or GenerateOptions()
    return Generation(session, prompt_ids, chosen, decode, begun, embeddings, taken)
