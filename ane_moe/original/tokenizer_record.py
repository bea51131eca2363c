"""Ids that a tokenizer gave for a fixed set of texts, for another to be compared with."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ane_moe.errors import UserError
from ane_moe.loop.tokenizer import Tokenizer

FILE_NAME = "tokenizer_record.json"
MAX_BYTES = 1 << 20
CHAT = "What is 12 x 34?\n  日本 and 😀"
SPECIAL_TOKENS = 8  # so many of them are written inside texts
TEXTS = (
    "The year 2024, and what came of it: don't, won't, it's O'Neill's.",
    " one leading space",
    "   three leading, two  inside, two trailing  ",
    "\ttabs\t\tand\u00a0no-break\u2003spaces",
    "lines\n\n\nand\r\nmore lines\n",
    "\n",
    " ",
    "0 7 42 365 1234567 3.14159 1,000,000 0xDEADBEEF 2024-02-29T23:59:60Z",
    "def merge(left: list[int]) -> None:\n    if not left:\n        return {**a, 'b': -1}  # ok\n",
    "https://example.org/a_b?c=d&e=%20f#g <br/> $x_{i}^2$ ~~~ ---- ....",
    "科学从提问开始。日本語のテキスト、한국어 문장",
    "naïve café, Größe, Ångström, coração, cafe\u0301 with a combining accent",
    "مرحبا بالعالم שלום עולם नमस्ते สวัสดี",
    "Наука началась утром. λόγος καί έργον",
    "😀 👩‍👩‍👧 🇪🇺 👍🏽",
    "camelCase snake_case SHOUTING ﬁ ½ ² ™ \u200b\ufeff",
)


@dataclass(frozen=True)
class Entry:
    """A text and its ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerRecord:
    """`chat` is a message and the ids of what the chat template makes of it, with the clock
    stopped; None without a template that takes one user's message."""

    texts: tuple[Entry, ...]
    chat: Entry | None

    def write(self, path: Path) -> None:
        """Write JSON; the caller makes it atomic."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def record_of(tokenizer: Tokenizer) -> TokenizerRecord:
    """What `tokenizer` makes of the texts, of its special tokens in a text, and of a message."""
    special = [f"one{token}two {token} three\n{token}" for token in _special_tokens(tokenizer)]
    entries = [Entry(text, tuple(tokenizer.encode(text))) for text in (*TEXTS, *special)]
    return TokenizerRecord(tuple(entries), _chat(tokenizer, CHAT))


def read_record(path: Path) -> TokenizerRecord:
    """Raises UserError for a file that is too large, or no record."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        chat = document["chat"]
        texts = tuple(map(_entry, document["texts"]))
        return TokenizerRecord(texts, None if chat is None else _entry(chat))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a record of a tokenizer",
            f"{type(error).__name__}: {error}",
            "convert again",
        ) from None


@dataclass(frozen=True)
class Difference:
    """A text that gives other ids than it should; `found` is None when the template refuses it."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...] | None


def differences(record: TokenizerRecord, tokenizer: Tokenizer) -> tuple[Difference, ...]:
    """What `tokenizer` makes of the record's texts otherwise, the chat message last."""
    pairs = [(entry, tuple(tokenizer.encode(entry.text))) for entry in record.texts]
    wrong = [Difference(entry.text, entry.ids, ids) for entry, ids in pairs if ids != entry.ids]
    if record.chat is not None and (chat := _chat(tokenizer, record.chat.text)) != record.chat:
        ids = chat.ids if chat else None
        wrong.append(Difference(record.chat.text, record.chat.ids, ids))
    return tuple(wrong)


def _chat(tokenizer: Tokenizer, message: str) -> Entry | None:
    try:
        return Entry(message, tuple(tokenizer.encode_chat(message, dated=False)))
    except UserError:  # what is wrong with it, --chat says where it is asked for
        return None


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Some tokens that are found in text before all else: the first and the last of them."""
    tokens = [str(token) for _, token in sorted(tokenizer.loaded.added_tokens_decoder.items())]
    half = SPECIAL_TOKENS // 2
    return tokens if len(tokens) <= SPECIAL_TOKENS else tokens[:half] + tokens[-half:]


def _entry(value: dict[str, object]) -> Entry:
    text, ids = value["text"], value["ids"]
    whole = isinstance(ids, list) and all(type(number) is int for number in ids)
    if not isinstance(text, str) or not isinstance(ids, list) or not whole:
        raise ValueError("an entry is not a text and its ids")
    return Entry(text, tuple(ids))
