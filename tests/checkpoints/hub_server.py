"""A server of this machine that speaks the Hugging Face Hub's routes, over folders: reading, and
with a folder for new repositories writing too."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file is one of LFS
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Hub:
    """What is served by name, and what was asked: (file, first byte, bytes sent). `break_after` is
    how many bytes are sent before the line breaks, once."""

    models: dict[str, Path]
    endpoint: str = ""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    break_after: int | None = None
    new: Path | None = None  # where repositories are made
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, by sha256
    commits: list[list[str]] = field(default_factory=list)  # the files of each
    take: int | None = None  # large files that are taken before permission ends
    asked_by: set[tuple[str, str]] = field(default_factory=set)  # (file, token)
    untold: str = ""  # the end of the names of files whose lengths are not told
    gated: tuple[str, ...] = ()  # tokens of those who may read; none: everybody

    def bytes_of(self, file: str) -> int:
        return sum(count for name, _, count in self.sent if name == file)


def point_at(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub take `hub` for the Hub, with empty caches below `cache`."""
    constants = huggingface_hub.constants
    for module in (constants, huggingface_hub.hf_api, huggingface_hub.file_download):
        if hasattr(module, "ENDPOINT"):
            monkeypatch.setattr(module, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, huggingface_hub.file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("ANE_MOE_CACHE", str(cache / "own-cache"))


@contextmanager
def served(models: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(models)

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_PUT(self) -> None:
        content, hub = self._content(), self.state
        if hub.take == 0:
            return self._json({"error": "no permission"}, True, 403)
        hub.take = None if hub.take is None else hub.take - 1
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        hub.objects[digest] = content
        self._json({}, True)

    def do_POST(self) -> None:
        path, content = unquote(self.path.split("?")[0]), self._content()
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []}, True)
        found = re.fullmatch(r"/(?:api/models/)?(\w+/[\w-]+)(?:\.git/info/lfs)?/(\w+)/[\w]+", path)
        assert found, path
        folder = self.state.models[found[1]]
        getattr(self, f"_{found[2]}")(folder, content)

    def _create(self, asked: dict[str, str]) -> None:
        hub, name = self.state, f"{asked['organization']}/{asked['name']}"
        assert hub.new is not None
        there = name in hub.models
        hub.models.setdefault(name, hub.new / name).mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{hub.endpoint}/{name}"}, True, 409 if there else 200)

    def _preupload(self, folder: Path, content: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self._json({"files": files}, True)

    def _objects(self, folder: Path, content: bytes) -> None:
        answers: list[dict[str, object]] = []
        for one in json.loads(content)["objects"]:
            to = {"upload": {"href": f"{self.state.endpoint}/large/{one['oid']}"}}
            known = one["oid"] in self.state.objects
            answers.append(one if known else one | {"actions": to})
        self._json({"transfer": "basic", "objects": answers}, True)

    def _commit(self, folder: Path, content: bytes) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.state.commits.append(sorted(files))
        name = folder.relative_to(self.state.new or folder).as_posix()
        url = f"{self.state.endpoint}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitUrl": url, "commitOid": COMMIT}, True)

    def _content(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or file
        folder = self.state.models.get(found[1]) if found else None
        if found is None or folder is None or found[2] not in (None, "main", "v1", COMMIT):
            return self._failed("RepoNotFound" if folder is None else "RevisionNotFound")
        if info:
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            names = [file.relative_to(folder).as_posix() for file in files]
            if "/tree/" in path:
                return self._json([_entry(n, f) for n, f in zip(names, files, strict=True)], body)
            siblings = [{"rfilename": name} for name in names]
            return self._json({"id": found[1], "sha": COMMIT, "siblings": siblings}, body)
        target, token = folder / found[3], self.headers.get("Authorization", "")
        self.state.asked_by.add((found[3], token.removeprefix("Bearer ")))
        if self.state.gated and token.removeprefix("Bearer ") not in self.state.gated:
            return self._failed("GatedRepo", 401)
        if not target.is_file():
            return self._failed("EntryNotFound")
        self._file(found[3], target.read_bytes(), body)

    def _file(self, name: str, content: bytes, body: bool) -> None:
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = int(asked[2]) + 1 if asked and asked[2] else len(content)
        piece = content[first:last]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{abs(hash((name, content))):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        untold = self.state.untold and name.endswith(self.state.untold)
        if untold and not asked:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.close_connection = bool(untold)
        if not body:
            return
        cut = self.state.break_after
        if cut is not None and len(piece) > cut:
            self.state.break_after, piece = None, piece[:cut]
            self.close_connection = True
        self.state.sent.append((name, first, len(piece)))
        self.wfile.write(piece)

    def _json(self, values: object, body: bool, status: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _failed(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code} here")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, file: Path) -> dict[str, object]:
    content = file.read_bytes()
    own = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": own}
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 100}
    return entry
