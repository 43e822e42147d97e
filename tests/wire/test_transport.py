"""LingeringTransport: the writes of one loop turn are sent together, in order, and none is lost at the close."""

import asyncio
import socket
from typing import Any, cast

import pytest

from tests.support.connections import Connection
from tests.support.servers import Server
from tokenauth.server.transport import LingeringTransport


class RecordingTransport(asyncio.Transport):
    """A transport that records what is sent, and when it is closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5)})
        self.sent: list[bytes | str] = []
        self.unsent = 0
        self.protocol: asyncio.BaseProtocol = asyncio.Protocol()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.sent.append("closed")

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.sent.append("ended")

    def resume_reading(self) -> None:
        """Do nothing: it never pauses reading."""

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return "closed" in self.sent


async def turn() -> None:
    """Run the event loop for one full turn."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_writes_of_one_loop_turn_are_sent_together() -> None:
    inner = RecordingTransport()
    transport = LingeringTransport(inner, asyncio.get_running_loop())
    transport.write(b"head ")
    transport.write(b"body")
    assert inner.sent == []
    await turn()
    assert inner.sent == [b"head body"]
    transport.write(b"more")
    await turn()
    assert inner.sent == [b"head body", b"more"]


async def test_buffered_data_is_sent_before_the_close() -> None:
    inner = RecordingTransport()
    transport = LingeringTransport(inner, asyncio.get_running_loop())
    transport.write(b"last")
    assert not transport.is_closing()
    transport.close()
    assert transport.is_closing()
    await turn()
    assert inner.sent == [b"last", "closed"]


@pytest.mark.parametrize(("lingers", "unsent"), [(True, 0), (False, 1)])
async def test_lingering_closes_only_the_write_side(lingers: bool, unsent: int) -> None:
    """While the client may still be sending, and while a part of the answer is not sent.

    The transport reports that it is closing and ignores later writes.
    """
    inner = RecordingTransport()
    transport = LingeringTransport(inner, asyncio.get_running_loop())
    transport.lingers, inner.unsent = lingers, unsent
    transport.write(b"last")
    transport.close()
    transport.close()
    assert transport.is_closing()
    transport.write(b"more")
    await turn()
    assert inner.sent == [b"last", "ended"]


async def test_at_most_64_kib_are_buffered() -> None:
    inner = RecordingTransport()
    transport = LingeringTransport(inner, asyncio.get_running_loop())
    parts = [bytes([number]) * 30_000 for number in range(5)]
    for part in parts:
        transport.write(part)
    assert inner.sent == [b"".join(parts[:3])]
    await turn()
    assert inner.sent == [b"".join(parts[:3]), b"".join(parts[3:])]


async def test_other_methods_are_those_of_the_transport() -> None:
    transport = LingeringTransport(RecordingTransport(), asyncio.get_running_loop())
    assert transport.get_extra_info("peername") == ("10.0.0.1", 5)
    assert isinstance(cast(Any, transport).sent, list)


def test_a_client_that_sends_ahead_can_read_the_last_answer(server: Server) -> None:
    """It goes on sending after the request that ends the connection."""
    requests = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    with Connection(server.port) as connection:
        expected = connection.ask("GET", "/openapi.json").body
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects: most waits at the server
        client.connect(("127.0.0.1", server.port))
        client.sendall(requests)
        received = b""
        while b"openapi" not in received:
            received += client.recv(4096)
        client.sendall(requests)
        while more := client.recv(4096):
            received += more
    assert received.endswith(expected)


@pytest.mark.parametrize("last", ["HTTP/1.1\r\nHost: x\r\nConnection: close", "HTTP/1.0"], ids=["close", "HTTP/1.0"])
def test_a_client_that_sends_on_after_its_last_request_is_answered(server: Server, last: str) -> None:
    """What it sends is discarded: more than one read of the server takes, before it reads the answer."""
    with Connection(server.port) as connection:
        expected = connection.ask("GET", "/openapi.json").body
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects: most waits at the server
        client.connect(("127.0.0.1", server.port))
        client.sendall(f"GET /openapi.json {last}\r\n\r\n".encode() + b"GET /healthz HTTP/1.1\r\n" * 9_000)
        received = b""
        while more := client.recv(65536):
            received += more
    assert received.endswith(expected)


def test_pipelined_requests_of_a_lost_client_are_no_errors(server: Server) -> None:
    """The client does not read, so that the answer to one of its requests waits when the client resets."""
    with Connection(server.port) as other:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
                assert client.recv(1) == b"H"
                for _ in range(20):  # the server goes on with the answers meanwhile
                    assert other.ask("GET", "/healthz").status == 200
            for _ in range(5):
                assert other.ask("GET", "/healthz").status == 200
    assert server.errors() == []
