"""The prompt of `generate`: a text, ids or embeddings, from where the command line says."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ane_moe.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ane_moe.loop.opened import OpenModel
    from ane_moe.loop.tokenizer import Begun


@dataclass(frozen=True)
class Prompt:
    """What the session takes in: ids, or the `rows` of embeddings `(T, d)` in their place. The
    first new token completes the one that is `begun`."""

    ids: list[int]
    rows: "np.ndarray | None" = None
    begun: "Begun | None" = None


@dataclass(frozen=True)
class PromptOptions:
    """The options of the prompt, as they are given: one of them at most, standard input when none
    is. A text goes into the chat template where `chat` is asked for."""

    text: str | None
    file: Path | None
    ids: str | None
    embeddings: Path | None
    chat: bool

    def require_one(self) -> None:
        """Raise UserError for a prompt that is given more than once."""
        given = (self.text, self.file, self.ids, self.embeddings)
        if sum(prompt is not None for prompt in given) > 1:
            raise UserError(
                "the prompt is given more than once",
                "",
                "use one of --prompt, --prompt-file, --prompt-ids, --embeddings",
            )

    def read(self) -> str | None:
        """The text, where it is one. Raises UserError."""
        if self.ids is not None or self.embeddings is not None:
            return None
        return self.text if self.text is not None else _read(self.file)

    def prompt(self, text: str | None, model: "OpenModel", folder: Path) -> Prompt:
        """What the model in `folder` makes of it; `text` is what was read. Raises UserError."""
        if text is not None:
            return _encoded(text, self.chat, model, folder)
        if self.ids is not None:
            return Prompt(_parse_ids(self.ids))
        from ane_moe.loop.embeddings_file import read_embeddings

        assert self.embeddings is not None
        return Prompt([], read_embeddings(self.embeddings, model.shards.manifest.d_model))


def _read(file: Path | None) -> str:
    """A file, or standard input."""
    if file is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt", "", "give --prompt, --prompt-file or --prompt-ids, or pipe it in"
        )
    try:
        return (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{file} cannot be read", str(error.strerror)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'stdin'} is not UTF-8 text", str(error)) from None


def _encoded(text: str, chat: bool, model: "OpenModel", folder: Path) -> Prompt:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer", "the checkpoint had none", "give --prompt-ids 1,2,3"
        )
    if chat:
        return Prompt(tokenizer.encode_chat(text))
    ids = tokenizer.encode(text)
    begun = tokenizer.heal(ids, model.shards.manifest.vocab)
    return Prompt(ids[:-1] if begun else ids, begun=begun)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            "--prompt-ids is not a list of ids", repr(text), "write it as 1,2,3"
        ) from None
