"""A checkpoint's folder: which of its files hold the weights, and what is none."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ane_moe.errors import UserError
from ane_moe.json_file import read_json
from ane_moe.lfs import FETCH, is_lfs_pointer
from ane_moe.wording import counted, listed

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MODEL_FOLDER = "give a Hugging Face model folder"
ADAPTER_ADVICE = "give its base model, and this folder as --adapter"
# safetensors files of an adapter, and of Mistral's original layout
NOT_THE_MODEL = ("adapter_model", "consolidated")
# Beside the weights: configuration, tokenizer, chat template.
SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab")
# Files beside the weights that are large enough for Git LFS
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Foreign:
    """What is no checkpoint in the form that is read: the telling files, its name, what to do."""

    files: tuple[str, ...]
    what: str
    do: str

    def telling(self, names: Iterable[str]) -> list[str]:
        """Those of the file names that tell."""
        return [name for name in names if any(fnmatchcase(name, file) for file in self.files)]


FOREIGN = (
    Foreign(
        ("runtime_meta.json",),
        "a conversion of ane-moe, not a checkpoint",
        "give the checkpoint, or run `ane-moe verify` or `generate` on this",
    ),
    Foreign((ADAPTER,), "an adapter, not a model", ADAPTER_ADVICE),
    Foreign(
        ("*.ggml",),
        "a GGML model, older than GGUF",
        "take a GGUF, or the safetensors model that it was made from",
    ),
    Foreign(
        ("params.json",),
        "a model in Meta's or Mistral's original layout",
        "take its Hugging Face form, with config.json and model*.safetensors",
    ),
    Foreign(
        ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "a model of pickled weights, which are not read",
        "load it with transformers where it is trusted, and save it with save_pretrained",
    ),
)


def folders_of(checkpoint: Path) -> tuple[Path, ...]:
    """Where what belongs to a checkpoint's weights may lie, the nearest first: its folder, and the
    repository's above `original/`, which holds weights alone."""
    above = (checkpoint.parent,) if checkpoint.name == "original" else ()
    return (checkpoint, *above)


def require_folder(path: str | Path) -> Path:
    """The folder, if it has a config.json, and no Git LFS pointers for a tokenizer. Raises
    UserError, which says what it is, if not."""
    folder = Path(path)
    if not folder.is_dir():
        raise _not_a_folder(str(path), folder)
    if not (folder / CONFIG).is_file():
        raise _cache(folder) or _foreign(folder) or _bare(folder)
    for path in (folder / name for name in TOKENIZER):
        if is_lfs_pointer(path):
            raise UserError(f"{path} is not a tokenizer's file", "a pointer of Git LFS", FETCH)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises UserError where there are none, or the index cannot
    be followed."""
    there = [one.name for one in folder.iterdir() if one.name != SINGLE or one.is_file()]
    names = _chosen(there, weight_map(folder).values())
    if not names:
        raise _foreign(folder) or UserError(f"{folder} holds no safetensors files", "no weights")
    return [_inside(folder, name) for name in names]


def weight_names(folder: Path, files: Collection[str]) -> list[str]:
    """The same by the names of `files` elsewhere, of which `folder` has the index, if there is one:
    those that can be had. None of them where there is no such file."""
    found = read_json(folder / INDEX).get("weight_map") if INDEX in files else {}
    told = [*found.values()] if isinstance(found, dict) else [found]
    return [name for name in _chosen(files, map(str, told)) if name in files and "/" not in name]


def _chosen(files: Collection[str], told: Iterable[str]) -> list[str]:
    """The names of the weight files, as transformers chooses: the single one, else those `told` by
    an index; else all."""
    if SINGLE in files:
        return [SINGLE]
    plain = (name for name in files if name.endswith(".safetensors"))
    return sorted({*told}) or sorted(name for name in plain if not name.startswith(NOT_THE_MODEL))


def weight_map(folder: Path) -> dict[str, str]:
    """File by tensor, as the index gives it; empty without one."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map", do="download it again")
    return found


def passed_over(folder: Path) -> str:
    """A sentence on shards that are there and are not read; nothing where there are none."""
    if not (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return ""
    named = {PurePosixPath(name).name for name in weight_map(folder).values()} - {SINGLE}
    beside = [name for name in named if (folder / name).is_file()]
    if not beside:
        return ""
    return (
        f"{SINGLE} was read, as transformers does, and {INDEX} with its "
        f"{counted(len(beside), 'file')} passed over: move {SINGLE} away if it is the older"
    )


def adapter_beside(folder: Path) -> str:
    """A sentence on an adapter beside the model; nothing where there is none."""
    if not (folder / ADAPTER).is_file():
        return ""
    return f"the adapter of {ADAPTER} is not applied: to convert it too, give it as --adapter"


def _not_a_folder(given: str, path: Path) -> UserError:
    wrong = f"{given} is not a checkpoint folder"
    if not path.exists():
        return UserError(wrong, "nothing there", f"{MODEL_FOLDER}, or OWNER/NAME on the Hub")
    if is_lfs_pointer(path):
        return UserError(wrong, "a pointer of Git LFS", FETCH)
    kind = next((kind for kind in FOREIGN if kind.telling([path.name])), None)
    if kind:
        return UserError(wrong, f"a file of {kind.what}", kind.do)
    inside = (path.parent / CONFIG).is_file()
    do = f"give its folder, {path.parent}" if inside else MODEL_FOLDER
    return UserError(wrong, "a file", do)


def _cache(folder: Path) -> UserError | None:
    """The error for a folder of the Hub's cache above the one that holds the files."""
    wrong = f"{folder} is not a checkpoint"
    snapshots = sorted(path.parent for path in (folder / "snapshots").glob(f"*/{CONFIG}"))
    if snapshots:
        newest = folder / "snapshots" / _main_revision(folder)
        given = newest if newest in snapshots else snapshots[-1]
        return UserError(
            wrong, "a model's folder in the Hub's cache", f"give its snapshot: {given}"
        )
    if models := [path.name for path in folder.glob("models--*") if path.is_dir()]:
        return UserError(
            wrong,
            f"the Hub's cache, with {listed(models)}",
            "give a snapshot in it: models--OWNER--NAME/snapshots/REVISION",
        )
    return None


def _main_revision(folder: Path) -> str:
    try:
        revision = (folder / "refs" / "main").read_text(encoding="ascii")[:100].strip()
    except (OSError, ValueError):
        return ""
    return revision if re.fullmatch(r"\w+", revision) else ""


def _foreign(folder: Path) -> UserError | None:
    names = sorted(path.name for path in folder.iterdir())
    for kind in FOREIGN:
        if telling := kind.telling(names):
            return UserError(f"{folder} holds {kind.what}", listed(telling), kind.do)
    return None


def _bare(folder: Path) -> UserError:
    wrong = f"{folder} is not a checkpoint"
    weights = [path.name for path in folder.glob("*.safetensors")]
    if weights:
        return UserError(
            wrong,
            f"{listed(weights)}, and no {CONFIG}",
            f"download the model's {CONFIG} and tokenizer too",
        )
    return UserError(wrong, f"no {CONFIG}", MODEL_FOLDER)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of an index. Only the name is checked: the Hub's cache links its files to a
    blob store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise UserError(
            f"{folder}'s index names a file outside the folder",
            repr(name),
            "do not trust this checkpoint",
        )
    if not (folder / name).is_file():
        raise UserError(
            f"{folder} is incomplete", f"no {name}, which its index names", "download it again"
        )
    return folder / name
