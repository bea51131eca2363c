"""Requests that are wrong, too large, too slow, or not welcome."""

import asyncio
import socket
import threading

import httpx
import pytest

from ane_moe.serve import app as serving
from ane_moe.serve.app import Limits
from ane_moe.serve.guard import Guard, Rules
from ane_moe.serve.listening import bind, host_names, is_loopback
from tests.serve.conftest import served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
SAID = [{"role": "user", "content": "0"}]


def post(server, path, content, **headers):
    return httpx.post(f"{server.url}{path}", content=content, headers=JSON | headers)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "tiny", "messages": NaN}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_broken_json_is_one_clear_error(server, content):
    for path in (CHAT, TEXT):
        answer = post(server, path, content)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and "JSON" in error["message"]


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "0"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "0", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 300}, "stop"),
        ({"seed": "one"}, "seed"),
        ({"stream": 1}, "stream"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"file": "/etc/passwd"}, "file"),
        ({"model": "other"}, "model"),
        ({"model": "../tiny"}, "model"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, changes, param):
    import json

    body = {"model": "tiny", "messages": SAID, "max_tokens": 2} | changes
    answer = post(server, CHAT, json.dumps(body).encode())
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "prompt", [None, 5, [], ["a", "b"], [[1], [2]], [1, "a"], [41], [-1], [True], "", {"a": 1}]
)
def test_a_prompt_that_is_none_is_refused(server, prompt):
    answer = httpx.post(f"{server.url}{TEXT}", json={"model": "tiny", "prompt": prompt})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_values_that_change_nothing_are_taken(server):
    neutral = {"n": 1, "frequency_penalty": 0, "tools": [], "user": "me", "metadata": {"a": "b"}}
    body = {"model": "tiny", "messages": SAID, "max_tokens": 2, "temperature": 0, "stop": None}
    plain = httpx.post(f"{server.url}{CHAT}", json=body).json()
    same = httpx.post(f"{server.url}{CHAT}", json=body | neutral).json()
    assert plain["choices"] == same["choices"]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHAT, 405),
        ("POST", "/", 405),
        ("GET", "/etc/passwd", 404),
        ("POST", "/v1/redact", 404),
    ],
)
def test_other_paths_and_methods_are_told_so(server, method, path, status):
    answer = httpx.request(method, f"{server.url}{path}")
    assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/..%2f..%2fetc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd"])
def test_no_path_of_a_request_is_opened(server, path):
    assert httpx.get(f"{server.url}{path}").status_code == 404


def test_requests_have_a_size_a_type_and_a_time(text, monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.2)
    with served(text.model, limits=Limits(body_bytes=1000)) as server:
        assert post(server, CHAT, b" " * 1001).status_code == 413
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            assert post(server, CHAT, b"{}", **{"content-type": kind}).status_code == 415
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(4096)
        with socket.create_connection((host, int(port))) as broken:
            broken.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert b" 400 " in broken.recv(4096)


def test_a_server_goes_by_its_own_names_alone(server):
    named = httpx.get(f"{server.url}/healthz", headers={"host": "evil.example:80"})
    assert named.status_code == 421
    for host in ("localhost", "LOCALHOST:8000", "[::1]:80", "127.0.0.1"):
        assert httpx.get(f"{server.url}/healthz", headers={"host": host}).status_code == 200


def test_a_key_is_asked_for_where_there_is_one(text):
    with served(text.model, rules=Rules(key="secret")) as server:
        for path in ("/v1/models", "/metrics", "/figures", "/report"):
            assert httpx.get(f"{server.url}{path}").status_code == 401
            for given in ("Bearer other", "secret", "Bearer sécret".encode()):
                headers = {"authorization": given}
                assert httpx.get(f"{server.url}{path}", headers=headers).status_code == 401
            right = {"authorization": "Bearer secret"}
            assert httpx.get(f"{server.url}{path}", headers=right).status_code == 200
        for path in ("/", "/healthz"):
            assert httpx.get(f"{server.url}{path}").status_code == 200


def test_what_is_told_of_a_server(server):
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in page.text and "https://" not in page.text and "//" not in page.text
    assert httpx.get(f"{server.url}/report").text == "<h2>report</h2>"
    told = httpx.get(f"{server.url}/figures").json()
    assert told["running"] == 0 and told["figures"]["runtime"] == "numpy"
    metrics = httpx.get(f"{server.url}/metrics").text
    for name in ("requests_waiting", "prompt_tokens_total", "queue_step_seconds_bucket"):
        assert f"ane_moe_{name}" in metrics


def test_a_reader_that_takes_nothing_is_let_go():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run():
        async def hangs(message):
            await asyncio.Event().wait()

        scope = {"type": "http", "path": "/", "headers": []}
        with pytest.raises(OSError, match="takes nothing"):
            await Guard(app, Rules(patience=0.05))(scope, None, hangs)

    asyncio.run(run())


def test_loopback_addresses_are_known_from_others():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))
    assert host_names("0.0.0.0") == frozenset() and "127.9.9.9" in host_names("127.9.9.9")


def test_redacting(marker):
    def redact(**body):
        return httpx.post(f"{marker.url}/v1/redact", json=body)

    told = redact(input="call 555 or 🙂 666", numbered=True).json()
    assert told["text"] == "call [ACCOUNT_NUMBER_1] or 🙂 [ACCOUNT_NUMBER_2]"
    assert told["table"] == {"[ACCOUNT_NUMBER_1]": "555", "[ACCOUNT_NUMBER_2]": "666"}
    assert [(span["start"], span["end"]) for span in told["spans"]] == [(5, 8), (14, 17)]
    assert told["counts"] == {"account_number": 2}
    plain = redact(input="a 12", labels=["account_number"], placeholder="X").json()
    assert plain["text"] == "a X" and plain["table"] == {}
    assert redact(input="a 12", labels=["email"]).json()["text"] == "a 12"
    assert redact(input="").json()["spans"] == []
    for wrong in (
        {},
        {"input": 5},
        {"input": "a", "labels": ["nose"]},
        {"input": "a", "numbered": True, "placeholder": "X"},
        {"input": "a", "preset": "best"},
        {"input": "a", "path": "/etc"},
    ):
        answer = redact(**wrong)
        assert answer.status_code == 400 and "/etc" not in answer.text
    assert httpx.post(f"{marker.url}{CHAT}", json={}).status_code == 404


def test_many_texts_at_once_are_not_mixed(marker):
    found = {}

    def one(number):
        body = {"input": f"name {number} " * 50}
        found[number] = httpx.post(f"{marker.url}/v1/redact", json=body, timeout=60).json()

    threads = [threading.Thread(target=one, args=(1000 + number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(told["spans"]) == 50 for told in found.values()) and len(found) == 20


def test_a_port_that_is_taken_is_one_clear_error():
    from ane_moe.errors import UserError

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="cannot listen on 127"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen"):
        bind("not a host", 80)
