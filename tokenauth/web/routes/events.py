"""GET /api/events: server-sent events, which say what to read again."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenauth.event_streams import Client, Events, Stream
from tokenauth.web.asgi_extensions import CLIENT, EVENTS, client_disconnected
from tokenauth.web.requests import Request
from tokenauth.web.responses import NO_STORE
from tokenauth.web.routing import Route, strict

_SEND_BUFFER = 16 * 1024
"""Bytes that the kernel keeps for a client that does not read."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    NO_STORE,
    (b"x-accel-buffering", b"no"),  # nginx sends each event at once
    (b"connection", b"close"),  # when the stream ends, so does the connection
]


class EventRoutes:
    def __init__(self, events: Events) -> None:
        self._events = events

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        return [Route(EVENTS, {"GET": strict(self.stream)}, middleware)]

    async def stream(self, request: Request) -> Response:
        if request.method == "HEAD":
            return EventResponse(self._events, None)
        client = _client(request.scope)
        last_id = (request.header(b"last-event-id") or b"")[:64].decode("latin-1")
        return EventResponse(
            self._events, await self._events.open(request.user, request.token, client, last_id or None)
        )


class EventResponse(Response):
    """Sends a stream until it ends; without one, only the headers."""

    def __init__(self, events: Events, stream: Stream | None) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = [*_HEADERS]
        self._events = events
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. An error ends it: the answer has begun, so there is no other one."""
        stream = self._stream
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while stream is not None:
                text = await stream.next()
                if text:
                    await send({"type": "http.response.body", "body": text, "more_body": True})
                if stream.ended:
                    break
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if stream is not None:
                self._events.close(stream)


class _ServerClient(Client):
    """A client of our server, which offers what other servers do not."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._state: dict[str, Any] = scope["extensions"][CLIENT]
        self._transport: asyncio.Transport = self._state["transport"]
        with suppress(OSError):
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def disconnected(self) -> bool:
        return client_disconnected(self._scope)

    def server_stops(self) -> bool:
        return bool(self._state["stopping"])

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def abort(self) -> None:
        self._transport.abort()


def _client(scope: Scope) -> Client:
    known = "transport" in scope.get("extensions", {}).get(CLIENT, {})
    return _ServerClient(scope) if known else Client()
