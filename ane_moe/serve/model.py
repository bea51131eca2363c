"""What is served: a language model that answers, or a privacy filter that marks."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ane_moe.errors import UserError
from ane_moe.loop.conversations import Conversations
from ane_moe.loop.figures import conditions, figures_dict
from ane_moe.loop.generation import GenerateOptions, Generation, Piece
from ane_moe.loop.labels import Labeller
from ane_moe.loop.messages import ChatForm
from ane_moe.loop.tokenizer import Begun, Tokenizer
from ane_moe.manifest import Manifest
from ane_moe.redaction.documents import pieces
from ane_moe.redaction.placeholders import Numbered, Plain, Template
from ane_moe.redaction.redactor import Redactor, marked
from ane_moe.redaction.spans import find_kinds, short_label
from ane_moe.redaction.viterbi import PRESETS, Biases
from ane_moe.redaction.windows import Scorer
from ane_moe.serve.line import IsHalted
from ane_moe.serve.refusal import Refusal
from ane_moe.serve.requests import Ask, RedactAsk


@dataclass(frozen=True)
class Prompt:
    """What an `Ask` becomes: ids that fit, and the options it is continued with, to one of the ids
    in `ends` at the latest."""

    ids: list[int]
    options: GenerateOptions
    ends: tuple[int, ...]
    begun: Begun | None = None

    @property
    def tokens(self) -> int:
        """With the one that was taken back."""
        return len(self.ids) + (self.begun is not None)


@dataclass(frozen=True)
class Begin:
    """Comes before the pieces of an answer: how many of the prompt's tokens were in a cache."""

    cached: int


@dataclass(frozen=True)
class End:
    """Comes after them: why it ended, and how many tokens are new."""

    finish_reason: str
    tokens: int


class LanguageModel:
    """Answers by the sessions of `conversations`, one at a time."""

    def __init__(self, conversations: Conversations, tokenizer: Tokenizer) -> None:
        self.manifest = conversations.shards.manifest
        self.tokenizer = tokenizer
        self.form = ChatForm(tokenizer)
        self._conversations = conversations
        self._encoding = threading.Lock()  # some tokenizers change while they encode
        tokenizer.encode("")  # settles what a first call changes: decoding goes on beside others
        self.figures = figures_dict(conversations.figures)  # after the last answer

    def prompt(self, ask: Ask) -> Prompt:
        """The prompt of an ask. Raises Refusal when it has no tokens or too many, and when the chat
        template does not take the messages."""
        options, begun, ids = ask.options, None, []
        try:
            with self._encoding:
                if ask.is_chat:
                    ids = self.form.encode(ask.messages)
                    options = replace(options, stop=(*options.stop, *self.form.stop))
                elif isinstance(ask.prompt, str):
                    ids = self.tokenizer.encode(ask.prompt)
                    begun = self.tokenizer.heal(ids, self.manifest.vocab)
                else:
                    ids = [*ask.prompt]
        except UserError as error:
            raise Refusal(400, str(error), param="messages") from None
        self._require(ids)
        options = replace(options, max_tokens=ask.max_tokens or self.manifest.context)
        return Prompt(ids[:-1] if begun else ids, options, self.manifest.eos_ids, begun)

    def answer(self, prompt: Prompt, halted: IsHalted) -> Iterator[Begin | Piece | End]:
        """The pieces of an answer between Begin and End. Raises UserError."""
        generation, taken = self._conversations.generate(
            prompt.ids, prompt.options, self.tokenizer.decode, prompt.begun, halted
        )
        yield Begin(taken)
        yield from generation
        yield self._ended(generation)

    def _ended(self, generation: Generation) -> End:
        result = generation.result()
        self.figures = figures_dict(result.figures)
        return End(result.finish_reason, len(result.ids))

    def _require(self, ids: list[int]) -> None:
        context, vocab = self.manifest.context, self.manifest.vocab
        if not ids:
            raise Refusal(400, "the prompt has no tokens", param="prompt")
        if len(ids) > context:
            said = f"the prompt has {len(ids)} tokens, and the context is {context}"
            raise Refusal(400, said, param="messages", code="context_length_exceeded")
        if not all(0 <= one < vocab for one in ids):
            raise Refusal(400, f"ids go from 0 to {vocab - 1}", param="prompt")


class PrivacyFilter:
    """Redacts texts, one at a time."""

    def __init__(self, redactor: Redactor, manifest: Manifest, biases: Biases) -> None:
        self.manifest = manifest
        self.labels = redactor.labels
        self._redactor = redactor
        self._biases = biases
        self.figures: dict[str, Any] = {}

    def require_known(self, ask: RedactAsk) -> None:
        """Raise Refusal for labels that the model has not, and a placeholder that cannot be
        undone."""
        try:
            find_kinds(ask.labels or (), self._redactor.scorer.labels)
            if ask.numbered:
                Numbered(Template(ask.placeholder))
        except UserError as error:
            raise Refusal(400, str(error)) from None

    def redacted(self, ask: RedactAsk, halted: IsHalted) -> Iterator[dict[str, Any]]:
        """The one answer: text, spans, counts by label, and the table of numbered placeholders."""
        biases = PRESETS[ask.preset] if ask.preset else self._biases
        base = self._redactor
        redactor = Redactor(base.scorer, base.tokenizer, ask.labels, biases)
        template = Template(ask.placeholder)
        places = Numbered(template) if ask.numbered else Plain(template)
        parts: list[str] = []
        spans: list[dict[str, Any]] = []
        for passage in redactor.passages(pieces([ask.text], "paragraph")):
            if halted():
                return
            one = marked(passage, places)
            parts.append(one.redacted)
            spans += [
                {
                    "start": passage.at + span.start,
                    "end": passage.at + span.end,
                    "label": span.label,
                    "score": round(span.score, 4),
                    "placeholder": placeholder,
                }
                for span, placeholder in zip(one.spans, one.placeholders, strict=True)
            ]
        self.figures = _labelled(base.scorer)
        yield {
            "text": "".join(parts),
            "spans": spans,
            "counts": dict(Counter(short_label(span["label"]) for span in spans)),
            "table": places.table if isinstance(places, Numbered) else {},
            "approximate": redactor.approximate,
        }


def _labelled(scorer: Scorer) -> dict[str, Any]:
    """Where the time of a labeller goes; nothing of another scorer."""
    if not isinstance(scorer, Labeller):
        return {}
    runtime = scorer.shards.runtime
    return {
        "runtime": runtime,
        "conditions": conditions(runtime),
        "labelled": scorer.figures.as_dict(),
    }


Served = LanguageModel | PrivacyFilter
