"""How connections end: half-closed, reset, incomplete or too slow, and which requests are answered."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
from starlette.types import Receive, Scope, Send

from tests.support.hosting import Gate, hosted, read_all, reset
from tests.support.journal import until
from tokenauth.server import protocol
from tokenauth.server.protocol import BoundedProtocol


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


HALF = b"POST /half HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"


@pytest.fixture
def gate() -> Iterator[Gate]:
    opened = Gate()
    yield opened
    opened.open()


@pytest.fixture
def connection(gate: Gate) -> Iterator[socket.socket]:
    with hosted(gate) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connected:
        yield connected
        gate.open()


def bodies(received: bytes) -> list[bytes]:
    """Return the bodies of all responses: each is the path of its request."""
    return [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK")[1:]]


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (get("/a"), [b"/a"]),
        (get("/a") + get("/b") + get("/c"), [b"/a", b"/b", b"/c"]),
        (get("/a") + b"GET /b HT", [b"/a"]),
        (get("/a") + HALF, [b"/a"]),
        (HALF, []),
        (b"GET /a HTT", []),
        (b"", []),
    ],
    ids=["one", "three", "and half a head", "and half a body", "half a body", "half a head", "nothing"],
)
def test_a_half_closed_client_gets_its_answers(
    gate: Gate, connection: socket.socket, sent: bytes, answered: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `nc -N`. The server closes the connection after the last response."""
    monkeypatch.setattr(protocol, "HALF_CLOSE", 60.0)
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    if answered:
        gate.await_arrivals(1)
    gate.open()
    assert bodies(read_all(connection)) == answered
    assert gate.answered_gone[: len(answered)] == [False] * len(answered)


@pytest.mark.parametrize("how", ["reset", "closed"])
def test_a_disconnected_client_is_detected(
    gate: Gate, connection: socket.socket, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.sendall(get("/a"))
    gate.await_arrivals(1)
    assert gate.gone() == [False]
    if how == "reset":
        reset(connection)
    else:
        monkeypatch.setattr(protocol, "HALF_CLOSE", -1.0)
        connection.close()
    until(lambda: gate.gone() == [True], "the server has noticed the close")


def test_a_client_that_half_closes_late_is_answered(
    gate: Gate, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HALF_CLOSE", -1.0)
    connection.sendall(get("/a"))
    gate.await_arrivals(1)
    connection.shutdown(socket.SHUT_WR)
    until(lambda: gate.gone() == [True], "the server has noticed the close")
    gate.open()
    assert bodies(read_all(connection)) == [b"/a"]


def test_under_plain_uvicorn_no_client_is_gone(gate: Gate) -> None:
    with hosted(gate, http="h11") as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connected:
        connected.sendall(get("/a"))
        gate.await_arrivals(1)
        reset(connected)
        gate.open()
    assert gate.gone() == [False]


async def tiny(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the whole body, then send a small response."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": b"x" * 100})


class Counting(BoundedProtocol):
    """The protocol, with a record of the longest pipeline."""

    most = 0
    opened: ClassVar[list["Counting"]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        Counting.most, Counting.opened = 0, [self]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        Counting.most = max(Counting.most, len(self.pipeline))


POST = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n" + b"." * 400


@pytest.mark.parametrize("one", [get("/a"), POST], ids=["GET", "POST"])
def test_requests_wait_in_the_network_not_in_memory(one: bytes) -> None:
    """The client sends without reading responses. When it reads, it receives a response to each request."""
    with hosted(tiny, http=Counting) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            connection.setsockopt(socket.SOL_SOCKET, direction, 64 * 1024)
        connection.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 10_000_000:
                sent += connection.send((one * 2000)[sent % len(one) :])
        assert sent < 10_000_000, "the server reads without bound"
        (protocol_,) = Counting.opened
        assert protocol_.transport.get_write_buffer_size() < 256 * 1024
        connection.settimeout(30)
        rest, received, answered = one[sent % len(one) :] if sent % len(one) else b"", b"", 0
        sending = threading.Thread(target=connection.sendall, args=[rest])  # it can finish once responses are read
        sending.start()
        while answered < -(-sent // len(one)):
            received = received[-1024:].rpartition(b"HTTP/1.1 200 OK")[2] + connection.recv(65536)
            answered += received.count(b"HTTP/1.1 200 OK")
        sending.join()
    assert Counting.most <= 1024 // len(one) + 2


@pytest.mark.parametrize(
    "sent", [b"", b"GET /a HTT", HALF, get("/a") + b"GET /b"], ids=["nothing", "head", "body", "next"]
)
def test_a_client_that_stops_sending_is_disconnected(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SLOW", 0.05)
    answers = sent.count(b"/a HTTP/1.1")

    def is_answered() -> bool:
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        ):
            connection.sendall(sent)
            return read_all(connection).count(b"HTTP/1.1 ") == answers
        return False

    with hosted(tiny, keep_alive=0.05) as port:
        until(is_answered, "on a busy machine, the time may be over before the server reads")


def is_connected(connection: socket.socket) -> bool:
    """Return whether the other end has not closed the connection."""
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SLOW", 0.05)
    with hosted(tiny) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(get("/a") * 1000)
        assert not is_connected(connection)
