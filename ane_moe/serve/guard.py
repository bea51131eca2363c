"""What stands before the application: who may ask, how much, and how long it may take."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ane_moe.serve.answers import as_bytes
from ane_moe.serve.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/healthz")  # paths that ask for no key
# The page's own: it loads nothing, and asks this server alone.
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        b"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Rules:
    """`hosts`: names that requests have to call this server by (empty: any); without that, a page
    of another origin could reach it by a name of its own. `key`: what clients have to know.
    A reader that takes nothing for `patience` seconds is let go."""

    hosts: frozenset[str] = frozenset()
    key: str | None = None
    patience: float = 60.0


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._require_welcome(scope["path"], dict(scope["headers"]))
        except Refusal as refusal:
            await _refuse(refusal, send)
            return
        await self._app(scope, receive, self._patient(send))

    def _require_welcome(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise Refusal for another host's name and without the key."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._rules.hosts and host_name(host) not in self._rules.hosts:
            raise Refusal(421, "this server does not go by that name")
        key = self._rules.key
        if key is None or path in OPEN:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    def _patient(self, send: Send) -> Send:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            try:
                async with asyncio.timeout(self._rules.patience):
                    await send(message)
            except TimeoutError:
                raise OSError("the reader takes nothing") from None

        return sent


def host_name(host: str) -> str:
    """The name in a Host header, without a port, in lower case."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


async def _refuse(refusal: Refusal, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), *HEADERS]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": as_bytes(refusal.as_json())})
