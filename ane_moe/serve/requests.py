"""What clients ask for: JSON bodies, checked field by field, as dataclasses.

A field that would change the answer and is not known, or not supported, is refused by its name
rather than passed over.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ane_moe.loop.generation import GenerateOptions
from ane_moe.loop.messages import ASSISTANT, SYSTEM, USER, Message
from ane_moe.redaction.placeholders import DEFAULT
from ane_moe.redaction.viterbi import PRESETS
from ane_moe.serve.refusal import Refusal

ROLES = {SYSTEM: SYSTEM, "developer": SYSTEM, USER: USER, ASSISTANT: ASSISTANT}
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_PLACEHOLDER = 256  # characters
COMPLETION_TOKENS = 16  # OpenAI's default
# Of other fields: the values that change nothing; None: any value.
NEUTRAL: dict[str, Sequence[Any] | None] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None, ""),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": None,
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "user": None,
    "metadata": None,
    "store": None,
    "service_tier": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
}


@dataclass(frozen=True)
class Ask:
    """Text to generate: an answer to `messages`, or what follows `prompt`, a text or ids.
    `max_tokens` None: as many as fit. `usage`: a stream ends with the counts of tokens."""

    model: str
    messages: tuple[Message, ...]
    prompt: str | tuple[int, ...]
    options: GenerateOptions
    max_tokens: int | None
    stream: bool
    usage: bool

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True)
class RedactAsk:
    """A text to redact; `labels` None: all of the model's; `preset` None: its own."""

    text: str
    labels: tuple[str, ...] | None
    placeholder: str
    numbered: bool
    preset: str | None


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises Refusal."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is not a JSON object")
    return found


def chat_ask(body: Mapping[str, Any]) -> Ask:
    """Of `/v1/chat/completions`. Raises Refusal."""
    fields = Fields(body)
    messages = tuple(map(_message, fields.take("messages", _messages, ())))
    if not messages:
        raise Refusal(400, "there are no messages", param="messages")
    wanted = fields.take("logprobs", _flag, False)
    top = fields.take("top_logprobs", _whole(0, MAX_TOP_LOGPROBS), None)
    if top is not None and not wanted:
        raise Refusal(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    most = fields.take("max_completion_tokens", _whole(1), None)
    older = fields.take("max_tokens", _whole(1), None)
    return _ask(fields, messages, "", (top or 0) if wanted else None, most or older)


def completion_ask(body: Mapping[str, Any]) -> Ask:
    """Of `/v1/completions`. Raises Refusal."""
    fields = Fields(body)
    prompt = fields.take("prompt", _prompt, None)
    if prompt is None:
        raise Refusal(400, "there is no prompt", param="prompt")
    top = fields.take("logprobs", _whole(0, MAX_TOP_LOGPROBS), None)
    most = fields.take("max_tokens", _whole(1), COMPLETION_TOKENS)
    return _ask(fields, (), prompt, top, most)


def redact_ask(body: Mapping[str, Any]) -> RedactAsk:
    """Of `/v1/redact`. Raises Refusal."""
    fields = Fields(body)
    text = fields.take("input", _text(), None)
    if text is None:
        raise Refusal(400, "there is no input", param="input")
    asked = RedactAsk(
        text,
        fields.take("labels", _names, None),
        fields.take("placeholder", _text(MAX_PLACEHOLDER), DEFAULT),
        fields.take("numbered", _flag, False),
        fields.take("preset", _one_of(PRESETS), None),
    )
    fields.take("model", _text(), "")
    fields.require_neutral()
    return asked


def _ask(
    fields: "Fields",
    messages: tuple[Message, ...],
    prompt: str | tuple[int, ...],
    top: int | None,
    most: int | None,
) -> Ask:
    """With the fields that both ways to ask share."""
    seed = fields.take("seed", _whole(-(1 << 63), (1 << 64) - 1), None)
    streams = fields.take("stream", _flag, False)
    shown = fields.take("stream_options", _stream_options, False)
    options = GenerateOptions(
        temperature=fields.take("temperature", _number(0, 2), 1.0),
        top_p=fields.take("top_p", _number(0, 1), 1.0),
        seed=None if seed is None else seed % (1 << 64),
        stop=fields.take("stop", _stops, ()),
        top_logprobs=top,
    )
    if options.top_p == 0:
        raise Refusal(400, "top_p must be above 0", param="top_p")
    model = fields.take("model", _text(), "")
    fields.require_neutral()
    return Ask(model, messages, prompt, options, most, streams, shown)


class Fields:
    """The fields of a body: each is taken once, and what is left has to change nothing."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = dict(body)

    def take(self, name: str, check: Callable[[Any], Any], default: Any) -> Any:
        """A field by its check, the default where it is absent or null. Raises Refusal."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        try:
            return check(value)
        except ValueError as error:
            raise Refusal(400, f"{name}: {error}", param=name) from None

    def require_neutral(self) -> None:
        for name, value in self._left.items():
            if name not in NEUTRAL:
                raise Refusal(400, f"unknown field {name[:80]!r}", param=name[:80])
            allowed = NEUTRAL[name]
            if value is not None and allowed is not None and value not in allowed:
                raise Refusal(400, f"{name} is not supported", param=name, code="unsupported")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it is true or false")
    return value


def _whole(least: int, most: int | None = None) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        sound = isinstance(value, int) and not isinstance(value, bool)
        if not sound or value < least or (most is not None and value > most):
            bound = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"it is a whole number, {bound}")
        return int(value)

    return check


def _number(least: float, most: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not sound or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"it is a number from {least} to {most}")
        return float(value)

    return check


def _text(longest: int | None = None) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("it is a text")
        if longest is not None and len(value) > longest:
            raise ValueError(f"it has at most {longest} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a character") from None
        return value

    return check


def _one_of(names: Mapping[str, Any]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"it is one of {', '.join(names)}")
        return value

    return check


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("it is a list of texts")
    return tuple(map(_text(), value))


def _stops(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > MAX_STOPS or "" in given:
        raise ValueError(f"it is a text or a list of at most {MAX_STOPS}, none of them empty")
    return tuple(map(_text(MAX_STOP_LENGTH), given))


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        raise ValueError("it is an object with include_usage")
    return _flag(value.get("include_usage") or False)


def _messages(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        raise ValueError(f"it is a list of at most {MAX_MESSAGES} messages")
    return value


def _message(value: Any) -> Message:
    fields = Fields(value if isinstance(value, dict) else {})
    role = fields.take("role", _one_of(ROLES), None)
    content = fields.take("content", _content, None)
    fields.take("name", _text(), None)
    fields.take("refusal", _text(), None)
    if role is None or content is None:
        raise Refusal(400, "a message has a role and a content", param="messages")
    fields.require_neutral()
    return Message(ROLES[role], content)


def _content(value: Any) -> str:
    """A text, or the texts of parts one behind the other."""
    if isinstance(value, str):
        return _text()(value)
    if not isinstance(value, list):
        raise ValueError("it is a text or a list of parts")
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        raise ValueError("parts are texts; this model takes nothing else")
    return "".join(_text()(part.get("text")) for part in value)


def _prompt(value: Any) -> str | tuple[int, ...]:
    """A text or ids, also as a list of one prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, list) and all(type(one) is int for one in value):
        return tuple(value)
    if isinstance(value, list):
        raise ValueError("it is one text, or one list of ids")
    return _text()(value)
