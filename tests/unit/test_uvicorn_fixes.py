"""Two fixes on uvicorn's own protocol, without the rest of this server: this is how uvicorn would use them."""

import asyncio
from typing import Any, cast

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.support.speaking import Wire, options, turn
from tokenauth.server.head_limit import HeadLimit
from tokenauth.server.transport import CoalescingTransport

LIMIT = 16 * 1024
BEGINNING = b"GET /first HTTP/1.1\r\nHost: a\r\n"


class WithHeadLimit(HttpToolsProtocol):
    """The lines from the docstring of HeadLimit."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.head_limit = HeadLimit(LIMIT)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.scope is not None and "method" not in self.scope:
            if self.head_limit.exceeded(self.scope, data):
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n")
                self.transport.close()
        elif self.head_limit.size:
            self.head_limit.reset()


class WithOneWrite(HttpToolsProtocol):
    """The line from the docstring of CoalescingTransport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, CoalescingTransport(transport, self.loop)))


class CountingWire(Wire):
    """A transport that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))
        super().write(data)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def connect(protocol: type[HttpToolsProtocol]) -> tuple[HttpToolsProtocol, CountingWire]:
    wire = CountingWire()
    connected = protocol(options(hello), ServerState(), {}, asyncio.get_running_loop())
    connected.connection_made(wire)
    return connected, wire


@pytest.mark.parametrize("endless", [b"x: y\r\n", b"x"], ids=["headers", "one header"])
async def test_uvicorn_reads_a_head_without_limit(endless: bytes) -> None:
    """The problem. When this fails, uvicorn has a limit of its own."""
    protocol, wire = connect(HttpToolsProtocol)
    protocol.data_received(BEGINNING)
    for _ in range(64):
        protocol.data_received(endless * (LIMIT // len(endless)))
    assert not wire.sent
    assert not wire.closed


@pytest.mark.parametrize("endless", [b"x: y\r\n", b"x"], ids=["headers", "one header"])
@pytest.mark.parametrize("piece", [1, 1000, 70_000])
async def test_a_head_without_end_is_refused(endless: bytes, piece: int) -> None:
    protocol, wire = connect(WithHeadLimit)
    sent = 0
    protocol.data_received(BEGINNING)
    while not wire.closed:
        assert sent <= LIMIT + piece, "nothing is refused"
        protocol.data_received((endless * piece)[:piece])
        sent += piece
    assert wire.sent.startswith(b"HTTP/1.1 431 ")
    assert sent + len(BEGINNING) >= LIMIT, "refused too early"


async def test_heads_below_the_limit_are_answered_in_a_row() -> None:
    """Together they are larger than the limit, and each begins in the data of the one before it."""
    protocol, wire = connect(WithHeadLimit)
    head = b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * (LIMIT - 200) + b"\r\n\r\n"
    for start in range(0, len(stream := head * 5), 1000):
        protocol.data_received(stream[start : start + 1000])
        await turn()
    assert wire.sent.count(b"HTTP/1.1 200 ") == 5
    assert not wire.closed


async def test_uvicorn_writes_head_and_body_apart() -> None:
    """The problem. When this fails, uvicorn writes them together by itself."""
    protocol, wire = connect(HttpToolsProtocol)
    protocol.data_received(BEGINNING + b"\r\n")
    await turn()
    assert len(wire.writes) == 2
    assert wire.writes[1] == b"hello"


async def test_head_and_body_are_written_together() -> None:
    protocol, wire = connect(WithOneWrite)
    protocol.data_received(BEGINNING + b"\r\n")
    await turn()
    assert len(wire.writes) == 1
    assert wire.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert wire.writes[0].endswith(b"\r\n\r\nhello")


async def test_an_answer_that_closes_is_written_before_the_close() -> None:
    protocol, wire = connect(WithOneWrite)
    protocol.data_received(BEGINNING + b"Connection: close\r\n\r\n")
    await turn()
    assert wire.closed
    assert wire.sent.endswith(b"hello")
