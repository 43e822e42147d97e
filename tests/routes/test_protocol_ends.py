"""How connections end: half-closed, given up, cut off, too slow; and what of their requests is answered."""

import socket
from collections.abc import Iterator

import pytest

from tests.hosting import Gate, hosted, read_all, reset
from tests.journal import until
from tokenauth import protocol


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


def bodies(heard: bytes) -> list[bytes]:
    """Return the bodies of answers, all of which are paths."""
    return [part.partition(b"\r\n\r\n")[2] for part in heard.split(b"HTTP/1.1 200 OK")[1:]]


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
    gate: Gate, connection: socket.socket, sent: bytes, answered: list[bytes]
) -> None:
    """As `nc -N` and scripts do; the connection is closed after them."""
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    if answered:
        gate.await_arrivals(1)
    gate.open()
    assert bodies(read_all(connection)) == answered
    assert gate.answered_gone[: len(answered)] == [False] * len(answered)


@pytest.mark.parametrize("how", ["reset", "closed"])
def test_a_client_that_gave_up_is_known_to_be_gone(
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
    until(lambda: gate.gone() == [True], "the server knows")


def test_a_client_that_ends_its_side_late_is_answered_all_the_same(
    gate: Gate, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HALF_CLOSE", -1.0)
    connection.sendall(get("/a"))
    gate.await_arrivals(1)
    connection.shutdown(socket.SHUT_WR)
    until(lambda: gate.gone() == [True], "the server knows")
    gate.open()
    assert bodies(read_all(connection)) == [b"/a"]


def test_under_another_server_no_client_is_gone(gate: Gate) -> None:
    with hosted(gate, http="h11") as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connected:
        connected.sendall(get("/a"))
        gate.await_arrivals(1)
        reset(connected)
        gate.open()
    assert gate.gone() == [False]
