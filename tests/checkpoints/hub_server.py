"""A server of this machine that speaks the Hugging Face Hub's routes, over folders."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Hub:
    """What is served by name, and what was asked: (file, first byte, bytes sent). `break_after` is
    how many bytes are sent before the line breaks, once."""

    models: dict[str, Path]
    endpoint: str = ""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    break_after: int | None = None

    def bytes_of(self, file: str) -> int:
        return sum(count for name, _, count in self.sent if name == file)


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
        target = folder / found[3]
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
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if not body:
            return
        cut = self.state.break_after
        if cut is not None and len(piece) > cut:
            self.state.break_after, piece = None, piece[:cut]
            self.close_connection = True
        self.state.sent.append((name, first, len(piece)))
        self.wfile.write(piece)

    def _json(self, values: object, body: bool) -> None:
        text = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _failed(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code} here")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(name: str, file: Path) -> dict[str, object]:
    return {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{hash(name):x}"}
