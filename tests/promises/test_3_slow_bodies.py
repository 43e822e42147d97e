"""Promise 3, for slow bodies: a token that is revoked before the body is complete is refused."""

import socket
from collections.abc import Iterator

import pytest

from tests.support.connections import Connection
from tests.support.servers import HandClock, Server

BODY = b'{"holder": "build"}'
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

PARTS: dict[str, tuple[bytes, bytes]] = {
    "nothing": (LENGTH, BODY),
    "a half": (LENGTH + BODY[:7], BODY[7:]),
    "all but a byte": (LENGTH + BODY[:-1], BODY[-1:]),
    "a chunk": (CHUNKED + b"7\r\n" + BODY[:7] + b"\r\n", b"c\r\n" + BODY[7:] + b"\r\n0\r\n\r\n"),
    "all but the end": (CHUNKED + b"13\r\n" + BODY + b"\r\n", b"0\r\n\r\n"),
}
"""The part of a body that is sent before the token is revoked, and the part after it."""


@pytest.fixture(scope="module")
def settings() -> str:
    return "[pools.p]\ncapacity = 100\nprefill = true\n[pools.p2]\n"


@pytest.fixture
def slow(server: Server, clock: HandClock) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        yield connection


@pytest.mark.parametrize("sent", PARTS)
@pytest.mark.parametrize("revoked", [True, False], ids=["revoked", "live"])
def test_the_token_is_checked_when_the_body_is_complete(
    here: Connection, there: Connection, slow: socket.socket, sent: str, revoked: bool
) -> None:
    """The token is revoked by another worker."""
    token = here.log_in()
    begin, end = PARTS[sent]
    slow.sendall(b"POST /api/pools/p/leases HTTP/1.1\r\nHost: x\r\nX-Token: %s\r\n" % token.encode() + begin)
    assert here.valid(token)  # by now this worker has read the beginning of the slow request
    if revoked:
        there.log_out(token)
    slow.sendall(end)
    assert slow.recv(65536)[:13] == (b"HTTP/1.1 401 " if revoked else b"HTTP/1.1 201 ")
