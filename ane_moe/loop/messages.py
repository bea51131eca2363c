"""Messages of a conversation, and the prompt that they become."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ane_moe.loop.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# How a plain transcript names who speaks; instructions stand above it without a name.
NAMES = {USER: "User", ASSISTANT: "Assistant"}


@dataclass(frozen=True)
class Message:
    """`role`: system, user or assistant."""

    role: str
    content: str


class ChatForm:
    """How messages become a prompt: by the checkpoint's chat template, or as a plain transcript
    where it has none (`is_plain`), which ends at what would be the user's next line."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_plain = not tokenizer.has_chat_template
        self.stop = (f"\n{NAMES[USER]}:",) if self.is_plain else ()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids, ready for the answer. Raises UserError when the template does not take them."""
        if self.is_plain:
            return self._tokenizer.encode(transcript(messages))
        return self._tokenizer.encode_messages([asdict(message) for message in messages])


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a text that an assistant's answer goes on from."""
    lines = [
        f"{NAMES[one.role]}: {one.content.strip()}\n"
        if one.role in NAMES
        else f"{one.content.strip()}\n\n"
        for one in messages
    ]
    return "".join([*lines, f"{NAMES[ASSISTANT]}:"])
