"""A checkpoint's tokenizer, and the form in which a conversion keeps it.

Which class reads tokenizer files hangs on the model beside them, on transformers' version, and on
what else is installed. So it is read once, in the checkpoint, and kept as tokenizer.json: its
whole pipeline, which one class reads and nothing has to choose.
"""

import codecs
import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.checkpoints.folder import folders_of
from ane_moe.checkpoints.gguf.header import read_gguf
from ane_moe.checkpoints.gguf.model import gguf_file
from ane_moe.checkpoints.gguf.vocabulary import read_vocabulary
from ane_moe.errors import UserError
from ane_moe.files import replaced, temporary_folder
from ane_moe.json_file import read_json
from ane_moe.loop.tokenizer import Tokenizer, read_saved
from ane_moe.original.gguf_tokenizer import tokenizer_of
from ane_moe.original.tokenizer_record import FILE_NAME as RECORD
from ane_moe.original.tokenizer_record import differences, record_of
from ane_moe.quiet_transformers import quiet_transformers

CONFIG = "tokenizer_config.json"
# Files that hold a vocabulary. A checkpoint with none of them has no tokenizer.
PIPELINE = "tokenizer.json"
VOCABULARIES = (
    PIPELINE,
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "*.tiktoken",
)
ALL_FILES = (
    *VOCABULARIES,
    CONFIG,
    RECORD,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
FAST = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in every transformers
# Of the machine and the checkpoint's folder; auto_map names code, which is not kept.
NOT_KEPT = ("auto_map", "is_local", "local_files_only", "name_or_path")


def require_tokenizer(checkpoint: Path) -> None:
    """Check that a tokenizer, where there is one, can be read; a sound tokenizer.json by its own
    library alone, which takes a tenth of transformers' time. Raises UserError as `read_tokenizer`,
    which looks at the others."""
    from tokenizers import Tokenizer as Pipeline

    if gguf_file(checkpoint):
        read_tokenizer(checkpoint)
        return
    holder = next(filter(vocabulary_files, folders_of(checkpoint)), checkpoint)
    try:
        Pipeline.from_file(str(holder / PIPELINE))
    except Exception:  # of a Rust library: no file, or one that it does not read
        read_tokenizer(checkpoint)


def read_tokenizer(checkpoint: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer as AutoTokenizer gives it, offline and without its own code; None
    when it has none.

    Raises UserError when it cannot be read here, naming the missing package where that is why.
    """
    if file := gguf_file(checkpoint):
        vocabulary = read_vocabulary(read_gguf(file).metadata)
        return None if isinstance(vocabulary, str) else Tokenizer(tokenizer_of(vocabulary))
    checkpoint = next(filter(vocabulary_files, folders_of(checkpoint)), checkpoint)
    found = vocabulary_files(checkpoint)
    if not found:
        return None
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            loaded = AutoTokenizer.from_pretrained(
                checkpoint,
                config=_marked_config(checkpoint),
                trust_remote_code=False,
                local_files_only=True,
            )
    except Exception as error:  # the tokenizer classes raise what they like
        reason, remedy = _why_unreadable(checkpoint, found, error)
        raise _unusable(checkpoint, found, reason, remedy) from error
    added = {*loaded.get_added_vocab(), *loaded.all_special_tokens}
    if loaded.get_vocab().keys() <= added:
        reason = f"{type(loaded).__name__} takes no vocabulary from {', '.join(found)}"
        raise _unusable(checkpoint, found, reason, "save it as tokenizer.json")
    return Tokenizer(loaded)


def _marked_config(checkpoint: Path) -> Any:
    """The configuration where config.json begins with a byte order mark, which transformers does
    not read; None where transformers reads it by itself."""
    path = checkpoint / "config.json"
    if not path.is_file() or not path.read_bytes().startswith(codecs.BOM_UTF8):
        return None
    from transformers import CONFIG_MAPPING

    values = read_json(path)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def vocabulary_files(checkpoint: Path) -> tuple[str, ...]:
    """Names of the files in `checkpoint` that hold a vocabulary."""
    paths = [path for pattern in VOCABULARIES for path in sorted(checkpoint.glob(pattern))]
    return tuple(path.name for path in paths if path.is_file())


@dataclass(frozen=True)
class TokenizerFiles:
    """What a conversion keeps: tokenizer files, the class that reads them, the record of ids."""

    names: tuple[str, ...]
    class_name: str | None
    record: str | None


def write_tokenizer(tokenizer: Tokenizer | None, out: Path) -> TokenizerFiles:
    """Keep `tokenizer` in `out`, with a record of the ids it gives.

    Raises UserError, and writes nothing, unless what is read back gives the same ids.
    """
    if tokenizer is None:
        return TokenizerFiles((), None, None)
    with temporary_folder() as folder:
        class_name = _save(tokenizer.loaded, folder)
        record = record_of(tokenizer)
        try:
            with quiet_transformers():
                wrong = differences(record, Tokenizer(read_saved(folder, class_name)))
        except Exception as error:  # the tokenizer classes raise what they like
            raise _not_kept(tokenizer, f"{type(error).__name__}: {error}") from error
        if wrong:
            raise _not_kept(tokenizer, f"other ids for {wrong[0].text!r}")
        names = tuple(sorted(path.name for path in folder.iterdir()))
        record.write(folder / RECORD)
        for name in (*names, RECORD):
            with replaced(out / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    return TokenizerFiles(names, class_name, RECORD)


def _save(loaded: Any, folder: Path) -> str:
    """Save as tokenizer.json where it can be one, chat templates inside tokenizer_config.json;
    returns the class that reads it."""
    from transformers import PreTrainedTokenizerFast

    fast = isinstance(loaded, PreTrainedTokenizerFast)
    loaded.save_pretrained(folder, save_jinja_files=False, legacy_format=False if fast else None)
    class_name = FAST if fast else type(loaded).__name__
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in NOT_KEPT}
    kept["tokenizer_class"] = class_name
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return class_name


def _unusable(checkpoint: Path, files: tuple[str, ...], reason: str, remedy: str) -> UserError:
    return UserError(
        f"{checkpoint}: its tokenizer cannot be read",
        reason,
        f"{remedy}; to convert without one, move {', '.join(files)} elsewhere",
    )


def _not_kept(tokenizer: Tokenizer, found: str) -> UserError:
    name = type(tokenizer.loaded).__name__
    return UserError(
        f"the checkpoint's tokenizer ({name}) cannot be kept as it is",
        found,
        "save it as tokenizer.json; to convert without one, move its files elsewhere",
    )


def _why_unreadable(checkpoint: Path, files: tuple[str, ...], error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    for name in files:
        package = _package_for(checkpoint / name)
        if package and importlib.util.find_spec(package) is None:
            reason = f"{name} needs the package {package}, which is not installed"
            return reason, f"pip install {package}"
    if _has_own_code(checkpoint):
        return "it is code of its own (auto_map), which is never run", "save it as tokenizer.json"
    reason = next(iter(str(error).splitlines()), "").rstrip(":")
    found = f"transformers takes none for this model from {', '.join(files)}"
    return (
        f"{found} ({type(error).__name__}: {reason})",
        "download it again, or save it as tokenizer.json",
    )


def _package_for(path: Path) -> str | None:
    """The optional package that transformers reads such a vocabulary with. tiktoken's are lines of
    base64 and a rank; sentencepiece's are protocol buffers."""
    if path.suffix == ".tiktoken":
        return "tiktoken"
    if ".model" not in path.name:
        return None
    with path.open("rb") as stream:
        first = stream.readline(1024)
    return "tiktoken" if TIKTOKEN_LINE.fullmatch(first) else "sentencepiece"


def _has_own_code(checkpoint: Path) -> bool:
    try:
        return "auto_map" in json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
