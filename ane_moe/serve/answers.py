"""Answers in the forms of OpenAI's API."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from ane_moe.loop.generation import Piece
from ane_moe.loop.sampling import TokenScores
from ane_moe.serve.model import Begin, End, Prompt

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
LEAST = -9999.0  # stands for minus infinity, which JSON has not
HALF = "\ufffd"  # in the text of a token that holds a part of a character

Decode = Callable[[Sequence[int]], str]


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + as_bytes(document) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def as_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


@dataclass
class Answer:
    """One answer as it comes: `take` everything, and give out chunks, or the whole at the end."""

    model: str
    prompt: Prompt
    decode: Decode
    is_chat: bool
    counts: bool = False  # whether a stream ends with the counts of tokens
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    cached: int = 0
    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    scored: list[tuple[int, TokenScores]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid4().hex}"

    def take(self, value: Begin | Piece | End) -> list[dict[str, Any]]:
        """The chunks of a stream that a value makes."""
        if isinstance(value, Begin):
            self.cached = value.cached
            first = {"delta": {"role": "assistant", "content": ""}}
            return [self._chunk(first)] if self.is_chat else []
        if isinstance(value, End):
            self.finish_reason = REASONS.get(value.finish_reason, "stop")
            self.tokens = value.tokens
            return [self._chunk(self._said("", None)), *self._counted()]
        offset = len(self.text)
        self.text += value.text
        scored = self._scored(value)
        self.scored += scored
        if not value.text and not scored:
            return []
        return [self._chunk(self._said(value.text, self._logprobs(scored, offset)))]

    def whole(self) -> dict[str, Any]:
        """The answer in one document."""
        wanted = self.prompt.options.top_logprobs is not None
        logprobs = self._logprobs(self.scored, 0) if wanted else None
        if self.is_chat:
            said: dict[str, Any] = {
                "message": {"role": "assistant", "content": self.text, "refusal": None}
            }
        else:
            said = {"text": self.text}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": self.finish_reason}
        return self._document("", [choice]) | {"usage": self.usage}

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt.tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt.tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def _scored(self, piece: Piece) -> list[tuple[int, TokenScores]]:
        ended = piece.id is None or piece.scores is None or piece.id in self.prompt.ends
        return [] if ended else [(piece.id, piece.scores)]  # type: ignore[list-item]

    def _said(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.is_chat:
            said = {"delta": {"content": text} if self.finish_reason is None else {}}
        return said | {"logprobs": logprobs}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        whole = {"index": 0, "logprobs": None, **choice, "finish_reason": self.finish_reason}
        chunk = self._document(".chunk", [whole])
        return chunk | {"usage": None} if self.counts else chunk

    def _counted(self) -> list[dict[str, Any]]:
        return [self._document(".chunk", []) | {"usage": self.usage}] if self.counts else []

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _logprobs(
        self, scored: Sequence[tuple[int, TokenScores]], offset: int
    ) -> dict[str, Any] | None:
        """Of tokens whose text begins at a character of the answer."""
        if self.prompt.options.top_logprobs is None:
            return None
        if self.is_chat:
            return {
                "content": [
                    self._token(one, scores.logprob)
                    | {"top_logprobs": [self._token(*pair) for pair in scores.top]}
                    for one, scores in scored
                ],
                "refusal": None,
            }
        names = [self.decode([one]) for one, _ in scored]
        return {
            "tokens": names,
            "token_logprobs": [_finite(scores.logprob) for _, scores in scored],
            "top_logprobs": [
                {self.decode([one]): _finite(value) for one, value in scores.top}
                for _, scores in scored
            ],
            "text_offset": [offset + sum(map(len, names[:place])) for place in range(len(names))],
        }

    def _token(self, identifier: int, logprob: float) -> dict[str, Any]:
        text = self.decode([identifier])
        whole = None if HALF in text else [*text.encode()]
        return {"token": text, "logprob": _finite(logprob), "bytes": whole}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
