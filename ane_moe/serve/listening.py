"""A server that listens: where, and until when."""

import ipaddress
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from ane_moe.errors import UserError
from ane_moe.serve.guard import App

LOCAL = ("localhost", "127.0.0.1", "[::1]")
IDLE_SECONDS = 15  # that a connection is kept between two requests
MOST_CONNECTIONS = 1024


def is_loopback(host: str) -> bool:
    """Whether programs of this machine alone reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> frozenset[str]:
    """What a server on a loopback address may be called by; none for others, which names of any
    kind lead to."""
    if not is_loopback(host):
        return frozenset()
    return frozenset((*LOCAL, f"[{host}]" if ":" in host else host))


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0: a free one. Raises UserError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        found = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host}, port {port}", found, "name another --host or --port"
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a server at that socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(app: App, bound: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers that are begun have `grace` seconds then. `ready` is
    called once requests are taken."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
        limit_concurrency=MOST_CONNECTIONS,
        lifespan="on",
    )
    server = _Server(config, ready)
    # uvicorn hands a signal on when it is done: to a handler that ends as Ctrl-C does
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
