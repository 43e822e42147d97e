"""Run the server's protocol without a socket, so that a test controls what arrives in one segment."""

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from tests.support.framing import Reading
from tokenauth.server.protocol import BoundedProtocol


class Wire(asyncio.Transport):
    """A transport that stores what is sent, and tracks whether reading is paused."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5)})
        self.sent = bytearray()
        self.reads = True
        self.ends = False
        self.closed = False
        self.protocol = asyncio.BaseProtocol()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: Any) -> None:
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ends = True

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def abort(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0  # everything is sent at once

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    async def readable(self) -> None:
        """Wait until reading is not paused, or the connection is closed."""
        await self.until(lambda: self.reads or self.closed or self.ends, "reading resumes")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Run the event loop until the condition is true."""
        for _ in range(1000):
            if condition():
                return
            await turn()
        raise AssertionError(f"not yet: {what}")


class Outcome(NamedTuple):
    """The result of a stream."""

    executed: list[Reading]
    """The requests that reached the app, in order. The body is None if it is incomplete."""
    statuses: list[int]
    closed: bool
    """Whether the connection was closed before the client ended its side."""


class Recorder:
    """ASGI app that stores requests, and answers 299: after it has read the body, or at once."""

    def __init__(self, reads: bool) -> None:
        self._reads = reads
        self.executed: list[Reading] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        place = len(self.executed)
        self.executed.append(Reading(scope["method"].encode(), target, None))
        body, more = b"", self._reads
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        if self._reads:
            self.executed[place] = self.executed[place]._replace(body=body)
        await send({"type": "http.response.start", "status": 299, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


def options(app: ASGIApp) -> uvicorn.Config:
    """Configure uvicorn as the server does."""
    config = uvicorn.Config(app, interface="asgi3", ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    return config


async def speak(segments: Iterable[bytes], reads: bool, hurry: bool, config: uvicorn.Config) -> Outcome:
    """Send segments, then end the client's side. With `hurry`, the event loop does not run in between."""
    app, wire = Recorder(reads), Wire()
    config.loaded_app = app
    protocol = BoundedProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(wire)
    for segment in segments:
        if wire.closed or wire.ends:
            break
        await wire.readable()
        protocol.data_received(segment)
        if not hurry:
            await turn()
    await turn()
    await wire.readable()
    closed = wire.closed or wire.ends
    if not wire.closed and not protocol.eof_received():
        wire.closed = True
    await wire.until(lambda: wire.closed, "the connection is closed")
    protocol.connection_lost(None)
    await turn()
    assert not protocol.tasks, "a request never ends"
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", bytes(wire.sent))]
    return Outcome(app.executed, [status for status in statuses if status != 100], closed)


async def turn() -> None:
    """Run the event loop a few times."""
    for _ in range(6):
        await asyncio.sleep(0)
