"""One conversation of several turns: what was said, and how much of it the model is shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ane_moe.errors import UserError
from ane_moe.loop.conversations import Conversations
from ane_moe.loop.generation import GenerateOptions, Generation
from ane_moe.loop.messages import ASSISTANT, SYSTEM, USER, ChatForm, Message
from ane_moe.loop.tokenizer import Tokenizer

ANSWER_SHARE = 4  # an answer has one token of so many of the context, unless it may have fewer
KEPT_SHARE = 2  # what is left out frees the context but for one token of so many


@dataclass(frozen=True)
class Turn:
    """An answer that comes: iterate `generation`. `taken` of the prompt's tokens were in the
    cache."""

    generation: Generation
    prompt_tokens: int
    taken: int


class Dialogue:
    """Turns of a user and an assistant, under a system message where there is one.

    Once the context leaves no room for an answer, the oldest messages are left out, up to one of
    the user's, until half of it is free; the system message stays, and so does the last one.
    """

    def __init__(
        self,
        conversations: Conversations,
        tokenizer: Tokenizer,
        options: GenerateOptions,
        system: str | None = None,
    ) -> None:
        self.form = ChatForm(tokenizer)
        self.messages: list[Message] = []  # all of them, but for the system's
        self.system = system
        self._conversations = conversations
        self._decode = tokenizer.decode
        self._context = conversations.shards.manifest.context
        self._options = replace(options, stop=(*options.stop, *self.form.stop))
        self.left_out = 0  # messages that the model is no longer shown, the oldest ones

    @property
    def transcript(self) -> list[Message]:
        """Everything that was said, under the system message."""
        return [*self._instructions, *self.messages]

    def ask(self, text: str, halted: Callable[[], bool] = lambda: False) -> Turn:
        """Begin the answer to `text`; `answered` ends it. `halted` is asked while the prompt is
        taken in.

        Raises UserError for a text that does not fit, and what the template does not take: then
        nothing was said.
        """
        messages = [*self.messages, Message(USER, text)]
        left_out, ids = self._fitting(messages)
        generation, taken = self._conversations.generate(
            ids, self._options, self._decode, halted=halted
        )
        self.messages, self.left_out = messages, left_out
        return Turn(generation, len(ids), taken)

    def answered(self, text: str) -> None:
        """Add what the assistant said to what was said."""
        self.messages.append(Message(ASSISTANT, text))

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.left_out = [], 0

    @property
    def _instructions(self) -> list[Message]:
        return [Message(SYSTEM, self.system)] if self.system else []

    def _fitting(self, messages: Sequence[Message]) -> tuple[int, list[int]]:
        """How many messages are left out, and the ids of the others."""
        answer = min(self._options.max_tokens, self._context // ANSWER_SHARE)
        left_out, ids = self.left_out, self._encode(messages[self.left_out :])
        most = self._context - answer
        while len(ids) > most:
            most = min(most, self._context // KEPT_SHARE)
            users = range(left_out + 1, len(messages))
            following = next((at for at in users if messages[at].role == USER), None)
            if following is None:
                break
            left_out = following
            ids = self._encode(messages[left_out:])
        if len(ids) > self._context - answer:
            raise UserError(
                "the message does not fit into the context",
                f"a prompt of {len(ids)} tokens, and {answer} for the answer, in {self._context}",
                "say it in fewer words, or convert with a larger --context",
            )
        return left_out, ids

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.form.encode([*self._instructions, *messages])
