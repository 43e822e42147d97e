"""Serve a test's ASGI app with the server's protocol, in a thread of the test's process."""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.journal import until
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.web.asgi_extensions import client_disconnected


@contextmanager
def hosted(
    app: ASGIApp,
    http: type[asyncio.Protocol] | Literal["h11", "httptools"] = BoundedProtocol,
    keep_alive: float = 30,
) -> Iterator[int]:
    """Serve an app, and yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # so that the kernel buffers little while the server waits
        listener.setsockopt(socket.SOL_SOCKET, direction, 64 * 1024)
    options = uvicorn.Config(
        app,
        interface="asgi3",
        loop="uvloop",
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
    )
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


class Gate:
    """ASGI app that answers each request with its path once `open` was called, and knows which clients have gone."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.answered_gone: list[bool] = []
        """For each answer, whether the client had gone."""
        self._open = threading.Event()

    def open(self) -> None:
        """Answer all requests from now on."""
        self._open.set()

    def gone(self) -> list[bool]:
        """Return, for each request, whether its client has gone."""
        return [client_disconnected(scope) for scope in self.scopes]

    def await_arrivals(self, count: int) -> None:
        """Wait until `count` requests have arrived."""
        until(lambda: len(self.scopes) >= count, f"{count} requests arrive")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await asyncio.to_thread(self._open.wait)
        self.answered_gone.append(client_disconnected(scope))
        body = scope["path"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset, so that the other side notices at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    received = b""
    while more := connection.recv(65536):
        received += more
    return received
