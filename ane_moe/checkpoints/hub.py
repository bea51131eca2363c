"""Checkpoints by their name on the Hugging Face Hub: `owner/name`, `owner/name@revision`, or the
same after `hf://`; with `:KIND` a GGUF file of that kind (`owner/name-GGUF:Q4_K_M`).

Only the files that a conversion reads are fetched, into the Hub's own cache, where interrupted
downloads go on. Of a model of which a few layers are wanted, only those tensors are fetched that
they need, by byte ranges, into files with holes under our own cache. For the workers of a cluster
weights stay on the Hub, as at other addresses (remote.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ane_moe.addresses import AT_COMMIT, HUB, address, local_path, reason_of
from ane_moe.checkpoints.folder import CONFIG, SMALL, weight_files, weight_names
from ane_moe.checkpoints.hub_range import range_at
from ane_moe.checkpoints.remote import (
    fetch_header,
    gguf_at,
    headers_at,
    keep,
    kept_at,
    remote_folder,
    url_of,
)
from ane_moe.checkpoints.safetensors_header import read_header
from ane_moe.errors import UserError
from ane_moe.fetch_lock import one_run, this_writer
from ane_moe.files import replaced
from ane_moe.json_file import read_json
from ane_moe.origins import note_origin
from ane_moe.user_cache import user_cache

NAME = re.compile(
    r"(?:(?i:hf):/{1,2})?(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?"
    r"(?::(?P<kind>\w[\w.-]*))?"
)
FILE = re.compile(  # one file of a repository
    r"(?i:hf):/{1,2}(?P<repository>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|(?!refs/)\w[\w.-]*))?/(?P<file>.+\.gguf)"
)
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>\w+)$")
PARTIAL = re.compile(
    r"/hub/(?P<owner>[^/]+?)--(?P<name>[^/]+)/(?P<revision>\w+)/(headers|layers[\d_]+)$"
)
# A GGUF model's name, its kind of quantisation at the end, and which part of it a file is.
GGUF = re.compile(r"(?P<model>.+?)(?:-(?P<part>\d{5})-of-\d{5})?\.gguf")
GGUF_KIND = re.compile(r"(?:.*[-._/])?((?:UD-)?(?:I?Q\d|TQ\d|MXFP4|NVFP4|BF16|F16|F32)\w*)", re.I)
NO_MODEL = ("mmproj", "imatrix")  # GGUF files that stand beside one
GGUF_HEADER_BYTES = 1 << 26  # with a vocabulary of 200,000 about a sixth of it
FETCHED = "fetched.json"  # of a folder with holes: what has arrived, by file
PIECE = 1 << 24  # bytes of a request
DO = "no such folder is here; check its name and the network; gated ones need `hf auth login`"


@dataclass(frozen=True)
class HubName:
    """A model on the Hub; `revision` is a branch, a tag or a commit, `kind` of its GGUF files the
    one that is meant."""

    repository: str
    revision: str | None = None
    kind: str | None = None

    def __str__(self) -> str:
        at, of = self.revision and f"@{self.revision}", self.kind and f":{self.kind}"
        return f"{self.repository}{at or ''}{of or ''}"

    @property
    def place(self) -> Path:
        """Where a room of our cache has what is fetched of a commit."""
        return Path(self.repository.replace("/", "--"), str(self.revision))


def hub_name(given: str | Path) -> HubName | None:
    """The model that is named; None for a path that is there, and for what is no name."""
    found = NAME.fullmatch(str(given))
    if found is None or Path(given).exists():
        return None
    return HubName(found["repository"], found["revision"], found["kind"])


def local_folder(
    given: str | Path, layers: Sequence[int] | None = None, *, apart: bool = False
) -> Path:
    """A folder with the checkpoint, or a GGUF file: the path itself, or what is fetched where a
    model of the Hub is named, or another address, whose tensors stay there (remote.py), as on the
    Hub where they are to be read `apart`. With `layers`, tensors of other layers may be zeros in
    it; with none of them, all.

    Raises UserError where there is no such model, no permission or no network and nothing in the
    cache.
    """
    if url := address(given):
        return remote_folder(url)
    if (file := FILE.fullmatch(str(given))) and not Path(given).exists():
        model = HubName(file["repository"], file["revision"])
        return _said(model, lambda: gguf_at(f"{_at_commit(model)}/{file['file']}"))
    name = hub_name(given)
    if name is None:
        return local_path(given)
    return _said(name, lambda: _folder(name, layers, apart))


def _at_commit(name: HubName) -> str:
    """The address of a model as it is now. Raises what the libraries of the Hub do."""
    import huggingface_hub as hub

    found = hub.HfApi().model_info(name.repository, revision=name.revision)
    return f"hf://{name.repository}@{found.sha}"


def local_config(name: HubName) -> Path:
    """config.json of a model of the Hub, fetched alone. Raises UserError as `local_folder`."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(name.repository, CONFIG, revision=name.revision)
    if isinstance(cached, str):
        return Path(cached)

    def fetched() -> Path:
        # Asks once; a download tries for half a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(name.repository, CONFIG, revision=name.revision))
        return Path(hub.hf_hub_download(name.repository, CONFIG, revision=name.revision))

    return _said(name, fetched, f"{CONFIG} of {name}", "give a local folder or config.json")


def origin(folder: Path) -> dict[str, str]:
    """Repository and commit of a folder in the Hub's cache, or in ours; empty for others. Raises
    UserError as `url_of`."""
    path = folder.absolute()
    if told := AT_COMMIT.fullmatch(url_of(path.parent if path.is_file() else path)):
        return {"hub": told["hub"], "revision": told["revision"]}
    places = [one.as_posix() for one in (path, *path.parents)]
    matches = (SNAPSHOT.search(place) or PARTIAL.search(place) for place in places)
    found = next((match for match in matches if match), None)
    if found is None:
        return {}
    return {"hub": f"{found['owner']}/{found['name']}", "revision": found["revision"]}


def _said(
    name: HubName,
    fetch: Callable[[], Path],
    what: str = "",
    do: str = DO,
) -> Path:
    try:
        return fetch()
    except UserError:
        raise
    except Exception as error:  # of many libraries: no network, no such model, no permission
        raise UserError(
            f"{what or name} cannot be fetched from the Hugging Face Hub",
            reason_of(error),
            do,
        ) from None


def _folder(name: HubName, layers: Sequence[int] | None, apart: bool) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE

    def snapshot(revision: str | None, patterns: list[str]) -> Path:
        folder = hub.snapshot_download(
            name.repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=offline,
        )
        return Path(folder)

    # By the branch's name first, so that the cache knows it without a network; by the commit then.
    folder = snapshot(name.revision, list(SMALL))
    commit = HubName(name.repository, folder.name)
    if offline:
        there = (path for path in folder.rglob("*") if path.is_file())
        files = [path.relative_to(folder).as_posix() for path in there]
    else:
        info = hub.HfApi().model_info(commit.repository, revision=commit.revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
    plain = any(file.endswith(".safetensors") for file in files)
    apart, url = apart and not offline, f"hf://{commit}"
    if parts := _gguf_parts(name, files) if name.kind or not plain else []:
        if apart:
            return gguf_at(f"{url}/{parts[0]}")
        return _gguf(commit, parts, header=layers is not None and not layers and not offline)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{name} has no {CONFIG}", f"{len(files)} other files", "name another")
    weights = weight_names(folder, files)
    if not weights:
        raise UserError(
            f"{name} has no safetensors weights", f"{len(files)} other files", "name another"
        )
    if apart:
        with kept_at(url, _small_files(folder)) as kept:
            return headers_at(url, weights, kept)
    if layers is not None and not offline:
        return _with_holes(commit, folder, weights, layers)
    return snapshot(commit.revision, list(map(_literal, weights)))


def _gguf_parts(name: HubName, files: list[str]) -> list[str]:
    """The files of the GGUF model that is meant, the first of its parts first; none where there is
    no such model. Raises UserError where several are there and none is named, or another."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        found = GGUF.fullmatch(file)
        if found and not file.rpartition("/")[2].startswith(NO_MODEL):
            models.setdefault(found["model"], []).append(file)
    kinds = {model: _kind(model) for model in models}
    wanted = (name.kind or "").lower()
    meant = [model for model, kind in kinds.items() if wanted in ("", kind.lower())]
    if len(meant) == 1:
        return models[meant[0]]
    if not models and not name.kind:
        return []
    asked = f"no GGUF model of kind {name.kind}" if name.kind else "several GGUF models"
    if name.kind and meant:
        asked = f"several GGUF models of kind {name.kind}"
    do = f"name one: {name.repository}:KIND"
    raise UserError(f"{name} has {asked}", ", ".join(sorted(set(kinds.values()))) or "none", do)


def _kind(model: str) -> str:
    """The kind at the end of a GGUF model's name, or the name."""
    found = GGUF_KIND.fullmatch(model)
    return found[1] if found else model.rpartition("/")[2]


def _gguf(name: HubName, parts: list[str], header: bool) -> Path:
    """The first of the files, all fetched, or files of full size that hold their `header`s
    alone."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    if not header:
        paths = [
            hub.hf_hub_download(
                name.repository,
                part,
                revision=name.revision,
                local_files_only=constants.HF_HUB_OFFLINE,
            )
            for part in parts
        ]
        return Path(paths[0])
    folder = _own_folder(name, "headers")
    with one_run(folder):
        for part in parts:
            _fetch_gguf_header(name, part, folder / part)
    note_origin(folder, f"{HUB}://{name}")
    return folder / parts[0]


def _fetch_gguf_header(name: HubName, file: str, path: Path) -> None:
    import huggingface_hub as hub

    url = hub.hf_hub_url(name.repository, file, revision=name.revision)
    found = hub.get_hf_file_metadata(url)
    size = found.size or 0
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, this_writer()) as unfinished, unfinished.open("wb") as stream:
        for first in range(0, min(size, GGUF_HEADER_BYTES), PIECE):
            last = min(first + PIECE, size, GGUF_HEADER_BYTES)
            stream.write(range_at(found.location, first, last))
        stream.truncate(size)


def _own_folder(name: HubName, held: str) -> Path:
    """Where our own cache has what is `held` of a model."""
    return user_cache() / "hub" / name.place / held


def _small_files(folder: Path) -> dict[str, bytes]:
    small = (file for file in folder.iterdir() if any(map(file.match, SMALL)))
    return {file.name: file.read_bytes() for file in small}


def _literal(file: str) -> str:
    """A pattern, as in a shell, of one file."""
    return re.sub(r"([*?[])", r"[\1]", file)


def _with_holes(name: HubName, small: Path, weights: list[str], layers: Sequence[int]) -> Path:
    """A folder with the `small` files and weight files of full size, in which only the tensors of
    `layers`, and those outside all layers, have arrived; of no layers, only their headers."""
    held = "_".join(map(str, ("layers", *sorted(layers)))) if layers else "headers"
    folder = _own_folder(name, held)
    with one_run(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in _small_files(small).items():
            keep(folder / file, data)
        arrived = _Arrived(folder / FETCHED)
        for weight_file in weights:
            _fetch_tensors(name, folder / weight_file, set(layers), arrived)
    weight_files(folder)  # says what is missing
    note_origin(folder, f"{HUB}://{name}")
    return folder


class _Arrived:
    """How far each range of each file has been fetched; kept, so that a second run goes on."""

    def __init__(self, path: Path):
        self.path = path
        kept = read_json(path) if path.is_file() else {}
        self.ends: dict[str, int] = {key: end for key, end in kept.items() if isinstance(end, int)}

    def note(self, key: str, end: int) -> None:
        self.ends[key] = end
        with replaced(self.path, this_writer()) as unfinished:
            unfinished.write_text(json.dumps(self.ends))


def _fetch_tensors(name: HubName, path: Path, layers: set[int], arrived: _Arrived) -> None:
    import huggingface_hub as hub

    url = hub.hf_hub_url(name.repository, path.name, revision=name.revision)
    found = hub.get_hf_file_metadata(url)
    place, size = found.location, found.size
    if not size:
        raise UserError(f"{url} has no size", "nothing to fetch", "name another revision")
    if not path.is_file() or path.stat().st_size != size:
        fetch_header(path, size, partial(range_at, place), place)
    for first, last in _runs(path, layers) if layers else ():
        key = f"{path.name}:{first}-{last}"
        start = arrived.ends.get(key, first)
        with path.open("r+b") as stream:
            for begin in range(start, last, PIECE):
                end = min(begin + PIECE, last)
                stream.seek(begin)
                stream.write(range_at(place, begin, end))
                stream.flush()
                arrived.note(key, end)


def _runs(path: Path, layers: set[int]) -> Iterator[tuple[int, int]]:
    """The byte ranges [first, last) of tensors that are needed; those that touch are one."""
    wanted = []
    for tensor in read_header(path).values():
        numbers = [int(number) for number in LAYER.findall(tensor.key)]
        if not numbers or layers & set(numbers[:1]):
            wanted.append((tensor.offset, tensor.offset + tensor.size))
    run: tuple[int, int] | None = None
    for first, last in sorted(wanted):
        if run is not None and run[1] == first:
            run = (run[0], last)
            continue
        if run is not None:
            yield run
        run = (first, last)
    if run is not None:
        yield run
