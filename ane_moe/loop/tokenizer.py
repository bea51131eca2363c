"""A conversion's tokenizer, and text from ids as they come."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.errors import UserError
from ane_moe.manifest import Manifest
from ane_moe.quiet_transformers import quiet_transformers

Decode = Callable[[Sequence[int]], str]

# In front of a template it takes the clock's place: any date is this text, whatever its format.
STOPPED_CLOCK = "{%- macro strftime_now(format) -%}2024{%- endmacro %}"
CONTEXT_IDS = 6  # prompt ids decoded along with new ones, so that leading spaces survive


@dataclass(frozen=True)
class Begun:
    """A token that the prompt begins and the model completes: what was taken back of the prompt,
    and the tokens, bool `[V]`, that begin with it."""

    taken_back: int
    allowed: np.ndarray


class Tokenizer:
    """Text to ids and back, by a tokenizer of transformers."""

    def __init__(self, loaded: Any) -> None:
        """`loaded` is a transformers tokenizer, as `from_pretrained` gives it."""
        self.loaded = loaded

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens the tokenizer adds by itself."""
        return list(self.loaded(text, verbose=False)["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, as `encode` gives them, and which characters each stands for: first,
        last + 1. Tokens of a part of a character stand for all of it, added ones for none.

        Raises UserError where the tokenizer does not know.
        """
        if not self.loaded.is_fast:
            raise UserError(
                "the tokenizer does not tell which characters its tokens stand for",
                type(self.loaded).__name__,
                "convert again with a tokenizer.json",
            )
        encoded = self.loaded(text, verbose=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    @property
    def has_chat_template(self) -> bool:
        return bool(self.loaded.chat_template)

    def encode_chat(self, text: str, dated: bool = True) -> list[int]:
        """Ids of `text` as one user's message, as `encode_messages` gives them."""
        return self.encode_messages([{"role": "user", "content": text}], dated)

    def encode_messages(
        self, messages: Sequence[Mapping[str, str]], dated: bool = True
    ) -> list[int]:
        """Ids of messages (`role`, `content`), ready for the answer, by the checkpoint's template.

        A template may write the date; not `dated`, it writes the same text every day. Raises
        UserError when there is no template, and when it does not take the messages.
        """
        if not self.has_chat_template:
            raise UserError(
                "the checkpoint's tokenizer has no chat template", "none", "leave out --chat"
            )
        try:
            stopped = None if dated else STOPPED_CLOCK + self.loaded.get_chat_template()
            return list(
                self.loaded.apply_chat_template(
                    [*map(dict, messages)],
                    chat_template=stopped,
                    add_generation_prompt=True,
                    return_dict=False,
                )
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise UserError(
                "the checkpoint's chat template does not take the messages",
                f"{type(error).__name__}: {error}",
                "give other messages, or a text to continue",
            ) from error

    def heal(self, ids: Sequence[int], vocab: int) -> "Begun | None":
        """What to take back of a prompt that ends in white space, where tokens exist that go on
        from it.

        A prompt such as `def ` ends in a token that training text hardly ever holds there: its
        space begins the next word's token. So that token is taken back, and the first new one must
        begin with it ("token healing", as in the guidance library).
        """
        if len(ids) < 2 or ids[-1] in self.loaded.all_special_ids or self.decode(ids[-1:]).strip():
            return None
        pieces = self.loaded.convert_ids_to_tokens(range(min(vocab, len(self.loaded))))
        allowed = np.zeros(vocab, bool)
        allowed[: len(pieces)] = [
            piece is not None and piece.startswith(pieces[ids[-1]]) for piece in pieces
        ]
        return Begun(ids[-1], allowed) if allowed.sum() > 1 else None

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.loaded.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer | None:
    """The conversion's tokenizer; None when the checkpoint had none.

    It is read offline, by the class that the manifest names, and no code from the folder is run.
    Raises UserError when the files cannot be read as a tokenizer.
    """
    if not manifest.tokenizer:
        return None
    try:
        with quiet_transformers():
            if manifest.tokenizer_class is not None:
                return Tokenizer(read_saved(folder, manifest.tokenizer_class))
            return Tokenizer(_read_copied(folder, manifest.family))
    except Exception as error:  # the tokenizer classes raise what they like
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"the tokenizer in {folder} cannot be read",
            f"{type(error).__name__}: {reason}",
            "convert again, or give --prompt-ids instead",
        ) from error


def read_saved(folder: Path, class_name: str) -> Any:
    """The tokenizer in `folder`, by the transformers class of that name. Raises what it raises."""
    import transformers

    loading = getattr(transformers, class_name)
    if not issubclass(loading, transformers.PreTrainedTokenizerBase):
        raise TypeError(f"{class_name} is no tokenizer of transformers {transformers.__version__}")
    return loading.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_copied(folder: Path, family: str) -> Any:
    """Older conversions hold the checkpoint's files as they were: the model chooses the class."""
    from transformers import AutoConfig, AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, config=AutoConfig.for_model(family), local_files_only=True, trust_remote_code=False
    )


class TextStream:
    """Text of a growing id sequence: every piece is final once given out.

    A piece is held back while it ends inside a character (byte-level tokens) or could be the
    beginning of a stop string; `stopped` turns true when one is complete, and neither it nor
    anything after it is given out.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        begun: Begun | None = None,
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids = list(prompt_ids[-CONTEXT_IDS:])
        given = [*self._ids, begun.taken_back] if begun else self._ids
        self._context = decode(given) if given else ""  # text that is not new
        self._new = 0  # ids after the context
        self._held = ""
        self.stopped = False

    def push(self, identifier: int) -> str:
        """Add one id; return the text that is certain now, often empty."""
        self._ids.append(identifier)
        self._new += 1
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._context):
            return ""
        piece = text[len(self._context) :]
        self._ids = self._ids[-self._new :]
        self._context, self._new = self._decode(self._ids), 0
        return self._release(piece)

    def finish(self) -> str:
        """What was held back when no more ids come."""
        if self.stopped:
            return ""
        piece = self._release(self._decode(self._ids)[len(self._context) :]) if self._new else ""
        if self.stopped:
            return piece
        rest, self._held, self._new = self._held, "", 0
        return piece + rest

    def _release(self, piece: str) -> str:
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            free = min(found)
        else:
            free = len(self._held) - max(
                (_overlap(self._held, stop) for stop in self._stop), default=0
            )
        given, self._held = self._held[:free], self._held[free:]
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (
            size
            for size in range(min(len(text), len(stop) - 1), 0, -1)
            if stop.startswith(text[-size:])
        ),
        0,
    )
