"""LingeringTransport: the writes of one loop turn are sent together, in order, and none is lost at the close."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from starlette.responses import PlainTextResponse

from tests.support.certificates import make_certificate
from tests.support.connections import Connection
from tests.support.servers import Server, serve, write_config
from tokenauth.server import transport as module
from tokenauth.server.acceptor import AcceptingServer
from tokenauth.server.protocol import DRAIN
from tokenauth.server.transport import LINGER, LingeringTransport
from tokenauth.server.worker import uvicorn_options
from tokenauth.settings.model import ServerSettings

SIZE = 400_000
"""Bytes of an answer that the kernel does not buffer as a whole."""


class RecordingTransport(asyncio.Transport):
    """A transport that records what is sent, and when it is closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5)})
        self.sent: list[bytes | str] = []
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
        """Return 0: data is sent at once."""
        return 0

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


async def test_lingering_closes_only_the_write_side() -> None:
    """The transport reports that it is closing and ignores later writes."""
    inner = RecordingTransport()
    transport = LingeringTransport(inner, asyncio.get_running_loop())
    transport.lingers = True
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


class Answering(asyncio.Protocol):
    """Sends an answer, closes, and tells when the connection is gone."""

    def __init__(self, answer: bytes, lingers: bool) -> None:
        self._answer = answer
        self._lingers = lingers
        self.gone = asyncio.Event()
        self.failure: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wrapped = LingeringTransport(cast(asyncio.Transport, transport), asyncio.get_running_loop())
        wrapped.lingers = self._lingers
        half = len(self._answer) // 2
        wrapped.write(self._answer[:half])
        wrapped.write(self._answer[half:])  # TLS counts as unsent only what comes after the first part
        wrapped.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failure = exc
        self.gone.set()


@asynccontextmanager
async def answered(
    answer: bytes, lingers: bool, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Answering, socket.socket]]:
    """Connect a client that receives little at a time."""
    loop, protocol = asyncio.get_running_loop(), Answering(answer, lingers)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects: most waits at the server
        client.setblocking(False)
        async with await loop.create_server(lambda: protocol, "127.0.0.1", 0, ssl=tls) as server, asyncio.timeout(50):
            await loop.sock_connect(client, server.sockets[0].getsockname())
            yield protocol, client


async def read_all(client: socket.socket) -> bytes:
    loop, received = asyncio.get_running_loop(), bytearray()
    while more := await loop.sock_recv(client, 1 << 20):
        received += more
    return bytes(received)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Runner]:
    """Run in either event loop, whose errors fail the test. LINGER is short."""
    monkeypatch.setattr(module, "LINGER", 0.1)
    errors: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=request.param) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: errors.append(context))
        yield runner
        runner.run(turn())
    assert errors == []


@pytest.mark.parametrize("size", [100, 10_000_000])
@pytest.mark.parametrize("lingers", [False, True])
def test_a_client_that_has_read_all_keeps_no_connection(runner: asyncio.Runner, size: int, lingers: bool) -> None:
    """The client keeps its socket open."""

    async def run() -> None:
        async with answered(b"x" * size, lingers) as (protocol, client):
            assert len(await read_all(client)) == size
            await protocol.gone.wait()
            assert protocol.failure is None

    runner.run(run())


def test_what_arrives_before_all_is_sent_is_discarded(runner: asyncio.Runner) -> None:
    """Closing with unread data would reset the connection."""

    async def run() -> None:
        async with answered(b"x" * 10_000_000, lingers=False) as (protocol, client):
            await asyncio.get_running_loop().sock_sendall(client, b"y" * 1_000_000)
            assert len(await read_all(client)) == 10_000_000
            await protocol.gone.wait()

    runner.run(run())


@pytest.mark.parametrize("lingers", [False, True])
def test_with_tls_all_is_sent(runner: asyncio.Runner, tmp_path: Path, lingers: bool) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate.certificate)

    async def run() -> None:
        async with answered(b"x" * 10_000_000, lingers, context) as (protocol, client):
            reader, writer = await asyncio.open_connection(sock=client, ssl=trusting, server_hostname="127.0.0.1")
            assert len(await reader.read()) == 10_000_000
            await protocol.gone.wait()
            writer.close()
            await writer.wait_closed()

    runner.run(run())


def serve_large_answer(listener: socket.socket, tls: ssl.SSLContext | None) -> AcceptingServer:
    """Return a server whose kernel buffers little."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    options = uvicorn_options(lambda: PlainTextResponse("x" * SIZE), ServerSettings())
    options.lifespan = "off"
    options.load()
    options.ssl = tls
    return AcceptingServer(options)


@pytest.mark.parametrize("protocol", ["http", "https"])
@pytest.mark.parametrize("closed_by", ["client", "stop"])
def test_a_slow_client_gets_the_whole_last_answer(tmp_path: Path, closed_by: str, protocol: str) -> None:
    """It reads nothing for longer than a client has to end TLS."""
    certificate, tls = make_certificate(tmp_path), None
    if protocol == "https":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as connection, ExitStack() as stack:
        server = serve_large_answer(listener, tls)
        thread = threading.Thread(target=server.run, args=([listener.dup()],))
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.settimeout(50)
        connection.connect(listener.getsockname())
        client = connection
        if tls is not None:
            trusting = ssl.create_default_context(cafile=certificate.certificate)
            client = stack.enter_context(trusting.wrap_socket(connection, server_hostname="127.0.0.1"))
        close = b"Connection: close\r\n" if closed_by == "client" else b""
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + close + b"\r\n")
        received = client.recv(1)
        server.should_exit = closed_by == "stop"
        threading.Event().wait(LINGER + 1 + (DRAIN if closed_by == "stop" else 0))
        while more := client.recv(1 << 20):
            received += more
    assert len(received.partition(b"\r\n\r\n")[2]) == SIZE


@pytest.mark.parametrize("lingers", [False, True])
def test_a_client_that_does_not_read_is_reset(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, lingers: bool
) -> None:
    monkeypatch.setattr(module, "FLUSH", 0.1)

    async def run() -> None:
        async with answered(b"x" * 10_000_000, lingers) as (protocol, client):
            await protocol.gone.wait()
            with suppress(ConnectionResetError):
                assert len(await read_all(client)) < 10_000_000

    runner.run(run())


def test_a_client_that_has_read_all_does_not_delay_a_stop(tmp_path: Path) -> None:
    """It keeps its connection, whose last answer was not sent yet when the server closed it."""
    request = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n"
    with serve(write_config(tmp_path)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects: most waits at the server
        client.connect(("127.0.0.1", server.port))
        client.sendall((request + b"\r\n") * 30 + request + b"Connection: close\r\n\r\n")
        assert sum(iter(lambda: len(client.recv(1 << 20)), 0)) > 10_000_000
        assert server.stop() == 0
        assert server.errors() == [], "must not stop waiting for the connection after half a minute"


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
