"""Checkpoints at an address that fsspec knows, such as `s3://bucket/model` or `https://host/model`.

The small files, and of the weight files the headers, are fetched into files of full size in a
folder of our cache; tensors are read where they are wanted, by byte ranges (weight_file.py), so
that the workers of a cluster need no disk in common for them.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ane_moe.addresses import file_system, unreadable
from ane_moe.checkpoints.folder import CONFIG, INDEX, SINGLE, SMALL, TOKENIZER, weight_names
from ane_moe.checkpoints.safetensors_header import MAX_HEADER_BYTES
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.checkpoints.weight_file import RemoteFile, read_range
from ane_moe.errors import UserError
from ane_moe.files import is_hidden, replaced, write_text
from ane_moe.user_cache import user_cache

ADDRESS_FILE = ".address"  # in a folder of our cache, and nowhere else
MAX_SMALL_BYTES = 1 << 28
# What is asked for at a web server that lists no folder.
ASKED = (
    *(CONFIG, INDEX, SINGLE, *TOKENIZER),
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "quantize_config.json"),
    *("hf_quant_config.json", "viterbi_calibration.json"),
)


def remote_folder(url: str) -> Path:
    """The folder of our cache for the checkpoint at `url`, as it is there now. Raises UserError."""
    folder = _root() / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ADDRESS_FILE, url)
    files, root = file_system(url)
    try:
        names = _names(files, root)
    except UserError:
        raise
    except Exception as error:  # of many libraries: network, permission
        raise unreadable(url, error) from None
    if CONFIG not in names:
        raise UserError(
            f"{url} has no {CONFIG}", f"{len(names)} other files", "give a model's folder"
        )
    weights = weight_names_of(url, folder, names)
    for path in folder.iterdir():
        if path.name not in (*names, *weights) and not is_hidden(path):  # another run's
            path.unlink()
    for name in weights:
        size = _size(files, f"{root}/{name}", f"{url}/{name}")
        fetch_header(folder / name, size, _reading(f"{url}/{name}"), f"{url}/{name}")
    return folder


def weight_names_of(url: str, folder: Path, names: list[str]) -> list[str]:
    """Those of the files that hold the weights, once the small ones are in `folder`."""
    for name in names:
        if any(PurePosixPath(name).match(pattern) for pattern in SMALL):
            _keep(folder / name, _whole(f"{url}/{name}"))
    weights = weight_names(folder, names)
    if not weights:
        raise UserError(f"{url} has no safetensors weights", f"{len(names)} other files")
    return weights


def url_of(folder: Path) -> str:
    """The address of a folder in our cache; nothing for others. Raises UserError for one that was
    taken out of it: its files are as large as they should be, and hold no weights."""
    record = folder / ADDRESS_FILE
    if not record.is_file():
        return ""
    url = record.read_text()
    if folder.resolve().parent != _root().resolve():
        raise UserError(f"{folder} has the headers of weight files alone", url, "give that address")
    return url


def placed(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a file of `folder` where their bytes are."""
    if not (url := url_of(folder)):
        return tensors
    files = {tensor.path: _remote(url, tensor.path) for tensor in tensors.values()}
    return {key: replace(tensor, path=files[tensor.path]) for key, tensor in tensors.items()}


def fetch_header(path: Path, size: int, read: Callable[[int, int], bytes], what: str) -> None:
    """A file of the whole size that holds the header of a safetensors file alone; one that is so
    already stays."""
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise UserError(f"{what} is not a safetensors file", f"a header of {length} bytes")
    header = read(0, 8 + length)
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as stream:
            if stream.read(8 + length) == header:
                return
    with replaced(path, _writer()) as partial, partial.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)


def _writer() -> str:
    """Runs for one address may fetch the same at once."""
    return f"{os.getpid()}-"


def _root() -> Path:
    return user_cache().absolute() / "remote"


def _remote(url: str, path: Any) -> RemoteFile:
    return RemoteFile(f"{url}/{path.name}", path.stat().st_size)


def _reading(url: str) -> Callable[[int, int], bytes]:
    return lambda first, last: read_range(url, first, last)


def _names(files: Any, root: str) -> list[str]:
    """The names of the files at a place."""
    try:
        listed = [path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
    except FileNotFoundError:
        listed = []
    if CONFIG in listed:
        return sorted(filter(_is_name, listed))
    there = [name for name in ASKED if files.exists(f"{root}/{name}")]
    if INDEX in there:
        index = json.loads(_read(files, f"{root}/{INDEX}", INDEX))
        told = {str(name) for name in index.get("weight_map", {}).values()}
        there += sorted(name for name in told if _is_name(name))
    return list(dict.fromkeys(there))


def _is_name(text: str) -> bool:
    """Whether it names a file of the folder itself."""
    return PurePosixPath(text).name == text != ".."


def _whole(url: str) -> bytes:
    files, path = file_system(url)
    return _read(files, path, url)


def _read(files: Any, path: str, what: str) -> bytes:
    """A small file. Raises UserError where it is none, or cannot be had."""
    if (size := _size(files, path, what)) > MAX_SMALL_BYTES:
        raise UserError(f"{what} is too large", f"{size} bytes")
    try:
        return bytes(files.cat_file(path))
    except Exception as error:  # as of `remote_folder`
        raise unreadable(what, error) from None


def _size(files: Any, path: str, what: str) -> int:
    """Bytes of a file. Raises UserError where it is not there, or nobody says."""
    try:
        return int(files.info(path)["size"] or 0)
    except Exception as error:  # as of `remote_folder`
        raise unreadable(what, error) from None


def _keep(path: Path, data: bytes) -> None:
    """Write a file unless it is so already: what was kept of it goes on by its times."""
    if path.is_file() and path.read_bytes() == data:
        return
    with replaced(path, _writer()) as partial:
        partial.write_bytes(data)
