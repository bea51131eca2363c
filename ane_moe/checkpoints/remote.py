"""Checkpoints at an address that fsspec knows, such as `s3://bucket/model` or `https://host/model`.

The small files, and of the weight files the headers, are fetched into files of full size in a
folder of our cache; tensors are read where they are wanted, by byte ranges (weight_file.py), so
that the workers of a cluster need no disk in common for them.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ane_moe.addresses import (
    ADDRESS_FILE,
    file_system,
    kept_as,
    read_small,
    tried,
    unreadable,
)
from ane_moe.checkpoints.folder import CONFIG, INDEX, SINGLE, SMALL, TOKENIZER, weight_names
from ane_moe.checkpoints.gguf.header import read_gguf
from ane_moe.checkpoints.gguf.model import SUFFIX, first_parts, part_names
from ane_moe.checkpoints.safetensors_header import MAX_HEADER_BYTES
from ane_moe.checkpoints.stored_tensor import StoredTensor
from ane_moe.checkpoints.weight_file import RemoteFile, WeightFile, read_range, weight_size
from ane_moe.errors import UserError
from ane_moe.fetch_lock import one_run, this_writer
from ane_moe.files import TEMPORARY, is_hidden, replaced
from ane_moe.origins import note_origin
from ane_moe.user_cache import user_cache
from ane_moe.wording import listed

STALE_SECONDS = 24 * 3600  # after which nobody is writing a file any more
# What is asked for at a web server that lists no folder.
ASKED = (
    *(CONFIG, INDEX, SINGLE, *TOKENIZER),
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "quantize_config.json"),
    *("hf_quant_config.json", "viterbi_calibration.json"),
)


def remote_folder(url: str) -> Path:
    """The folder of our cache for the checkpoint at `url`, as it is there now; of a GGUF model, its
    file there. Raises UserError."""
    if url.endswith(SUFFIX):
        return gguf_at(url)
    try:
        names = _names(url)
    except UserError:
        raise
    except Exception as error:  # of many libraries: network, permission
        raise unreadable(url, error) from None
    plain = any(name.endswith(".safetensors") for name in names)
    if CONFIG not in names and not plain and (models := first_parts(names)):
        if len(models) > 1:
            found = listed(models)
            raise UserError(f"{url} holds more than one GGUF model", found, "give one of them")
        return gguf_at(f"{url}/{models[0]}")
    if CONFIG not in names:
        raise UserError(
            f"{url} has no {CONFIG}", f"{len(names)} other files", "give a model's folder"
        )
    small = (name for name in names if any(map(PurePosixPath(name).match, SMALL)))
    with kept_at(url, {name: _whole(f"{url}/{name}") for name in small}) as folder:
        weights = weight_names(folder, names)
        if not weights:
            raise UserError(f"{url} has no safetensors weights", f"{len(names)} other files")
        for path in folder.iterdir():
            if path.name not in (*names, *weights) and not is_hidden(path):  # another run's
                path.unlink()
        return headers_at(url, weights, folder)


@contextmanager
def kept_at(url: str, files: Mapping[str, bytes]) -> Iterator[Path]:
    """The folder of our cache for an address, with these files in it, for this run alone."""
    folder = _root() / kept_as(url)
    with one_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{TEMPORARY}*"):  # of a killed run
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
        keep(folder / ADDRESS_FILE, url.encode())
        for name, data in files.items():
            keep(folder / name, data)
        yield folder
    note_origin(folder, url)


def headers_at(url: str, weights: Iterable[str], folder: Path) -> Path:
    """The folder of an address, with the headers of its safetensors files. Raises UserError."""
    for name in weights:
        file = f"{url}/{name}"
        fetch_header(folder / name, _size(file), partial(read_range, file), file)
    return folder


def gguf_at(url: str) -> Path:
    """A file of full size in our cache that has the header of the GGUF file at `url` alone, beside
    those of its further parts. Raises UserError."""
    above, _, given = url.rpartition("/")
    names = part_names(given) or [given]
    with kept_at(above, {}) as folder:
        for name in names:
            file = RemoteFile(f"{above}/{name}", _size(f"{above}/{name}"))
            tensors = read_gguf(file).tensors.values()
            header = min((tensor.offset for tensor in tensors), default=file.size)
            _keep_header(folder / name, file.size, read_range(file.url, 0, header))
        return folder / names[0]


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


def placed_file(file: Path) -> WeightFile:
    """Where the bytes of a file are of which our cache may have the header alone."""
    url = url_of(file.parent)
    return _remote(url, file) if url else file


def fetch_header(path: Path, size: int, read: Callable[[int, int], bytes], what: str) -> None:
    """A file of the whole size that holds the header of a safetensors file alone; one that is so
    already stays."""
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise UserError(f"{what} is not a safetensors file", f"a header of {length} bytes")
    _keep_header(path, size, read(0, 8 + length))


def _keep_header(path: Path, size: int, header: bytes) -> None:
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as stream:
            if stream.read(len(header)) == header:
                return
    with replaced(path, this_writer()) as unfinished, unfinished.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)


def _root() -> Path:
    return user_cache().absolute() / "remote"


def _remote(url: str, path: Any) -> RemoteFile:
    return RemoteFile(f"{url}/{path.name}", path.stat().st_size)


def _names(url: str) -> list[str]:
    """The names of the files at a place."""
    files, root = file_system(url)
    try:
        found = tried(lambda: files.ls(root, detail=False))
        there = [path.rstrip("/").rpartition("/")[2] for path in found]
    except FileNotFoundError:
        there = []
    if CONFIG in there or first_parts(there):
        return sorted(filter(_is_name, there))
    there = [name for name in ASKED if tried(partial(files.exists, f"{root}/{name}"))]
    if INDEX in there:
        index = json.loads(_whole(f"{url}/{INDEX}"))
        told = {str(name) for name in index.get("weight_map", {}).values()}
        there += sorted(name for name in told if _is_name(name))
    return list(dict.fromkeys(there))


def _is_name(text: str) -> bool:
    """Whether it names a file of the folder itself."""
    return PurePosixPath(text).name == text != ".."


def _whole(url: str) -> bytes:
    """A small file. Raises UserError where it is none, or cannot be had."""
    try:
        return read_small(url)
    except FileNotFoundError as error:
        raise unreadable(url, error) from None


def _size(url: str) -> int:
    """Bytes of a weight file. Raises UserError where it is not there, or nobody says."""
    if (size := weight_size(url)) is None:
        do = "download it, and give the folder"
        raise UserError(f"{url} has no size that its server tells", "no Content-Length", do)
    return size


def keep(path: Path, data: bytes) -> None:
    """Write a file unless it is so already: what was kept of it goes on by its times."""
    if path.is_file() and path.read_bytes() == data:
        return
    with replaced(path, this_writer()) as unfinished:
        unfinished.write_bytes(data)
