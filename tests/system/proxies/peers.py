"""The peers of a proxy: a client, an upstream that records requests, and a relay to the issuer."""

import asyncio
import contextlib
import http.client
import socket
import threading
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Coroutine, Iterator, Sequence
from hashlib import sha1
from typing import Any, NamedTuple, Self

HANG = b""
"""The answer of a relay that accepts connections and never answers."""


class Arrived(NamedTuple):
    """One request as it arrived, with the exact bytes of names and values."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]

    def values(self, *names: str) -> list[bytes]:
        """Return the values of the named headers, in any case."""
        wanted = {name.lower().encode() for name in names}
        return [value for name, value in self.headers if name.lower() in wanted]


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Peer(ABC):
    """A server on a free port, in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks = set[asyncio.Task[None] | None]()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listen. After a stop, the port is the same as before."""

        async def listen() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
            self.port = self._server.sockets[0].getsockname()[1]

        self._do(listen())

    def stop(self) -> None:
        """Stop listening, and close all connections."""

        async def end() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            await self._hang_up()

        self._do(end())

    def hang_up(self) -> None:
        """Close all connections."""
        self._do(self._hang_up())

    async def _hang_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(task := asyncio.current_task())  # asyncio keeps only weak references to tasks
        try:
            await self.speak(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    @abstractmethod
    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""


_PAGE = b"""<!doctype html><title>app</title><h1>Private page of %b</h1>
<form method="post" action="/posted"><input name="x" value="y"><button>Send</button></form>"""


class Upstream(Peer):
    """The application. It accepts all requests, and records them. It opens WebSockets, except at /ws/refused.

    Browsers may cache its pages. It says so at /cached only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrived: list[Arrived] = []

    def take(self) -> list[Arrived]:
        """Return the requests since the last call."""
        arrived, self._arrived = self._arrived, []
        return arrived

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_request(reader)
            self._arrived.append(request)
            key = request.values("Sec-WebSocket-Key")
            if key and request.values("Upgrade") and request.target != b"/ws/refused":
                await self._echo(key[0], reader, writer)
                return
            content, kind = b"in", b"text/plain"
            if any(b"text/html" in value for value in request.values("Accept")):
                content, kind = _PAGE % b", ".join(request.values("X-Auth-User")), b"text/html"
            status = b"404 Not Found" if request.target == b"/missing" else b"200 OK"
            cache = b"Cache-Control: max-age=60\r\n" if request.target == b"/cached" else b""
            writer.write(b"HTTP/1.1 %b\r\nContent-Type: %b\r\n%b" % (status, kind, cache))
            writer.write(b"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
            await writer.drain()

    async def _echo(self, key: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Open a WebSocket (RFC 6455), send its first message back, and wait until it ends."""
        accept = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())  # noqa: S324 - as the RFC says
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
        writer.write(b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept)
        head = await reader.readexactly(6)
        payload = await reader.readexactly(head[1] & 127)
        plain = bytes(byte ^ head[2 + place % 4] for place, byte in enumerate(payload))
        writer.write(bytes([0x81, len(plain)]) + plain)
        await reader.read()


class Relay(Peer):
    """The connection from a proxy to the issuer. It can be cut, hang, or give other answers."""

    def __init__(self, issuer: int) -> None:
        super().__init__()
        self._issuer = issuer
        self._instead: bytes | None = None
        self._sent = bytearray()
        self._ends = False

    def take(self) -> bytes:
        """Return what the proxy has sent since the last call."""
        sent, self._sent = bytes(self._sent), bytearray()
        return sent

    def end_at_next_request(self) -> None:
        """Close the connection of the next request without an answer."""
        self._ends = True

    @contextlib.contextmanager
    def answering(self, instead: bytes) -> Iterator[None]:
        """Temporarily answer this instead of the issuer, or HANG."""
        self.hang_up()
        self._instead = instead
        try:
            yield
        finally:
            self._instead = None
            self.hang_up()

    @contextlib.contextmanager
    def leading_to(self, issuer: int) -> Iterator[None]:
        """Temporarily connect to another issuer."""
        before = self._issuer
        self.hang_up()
        self._issuer = issuer
        try:
            yield
        finally:
            self._issuer = before
            self.hang_up()

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward in both directions, each to its end: an issuer may answer before it has the whole body."""
        if self._instead is not None:
            if self._instead == HANG:
                await asyncio.Event().wait()
            await read_request(reader)
            writer.write(self._instead)
            await writer.drain()
            return
        answers, questions = await asyncio.open_connection("127.0.0.1", self._issuer)
        try:
            await asyncio.gather(self._pump(reader, questions, keep=True), self._pump(answers, writer, keep=False))
        finally:
            questions.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: bool) -> None:
        while data := await reader.read(65536):
            if keep and self._ends:
                self._ends = False
                raise EOFError
            if keep:
                self._sent += data
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def read_request(reader: asyncio.StreamReader) -> Arrived:
    """Read one request with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.split(b" ")
    headers = [_field(line) for line in lines]
    known = {name.lower(): value for name, value in headers}
    body, trailers = b"", []
    if b"chunked" in known.get(b"transfer-encoding", b""):
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        while (line := await reader.readline()) != b"\r\n":
            trailers.append(_field(line))
    else:
        body = await reader.readexactly(int(known.get(b"content-length", 0)))
    return Arrived(method, target, headers, body, trailers)


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name, value.strip()


def ask(
    port: int,
    target: str = "/",
    headers: Sequence[tuple[str, str]] = (),
    method: str = "GET",
    body: bytes = b"",
    host: str = "app.example.com",
) -> Reply:
    """Send a request unchanged on a new connection. Status 0 means that the connection was closed."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    names = {name for name, _ in headers}
    if "Connection" not in names:
        lines.append("Connection: close")
    if body and "Transfer-Encoding" not in names:
        lines.append(f"Content-Length: {len(body)}")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        answer = http.client.HTTPResponse(connection, method=method)
        try:
            answer.begin()
            return Reply(answer.status, answer.headers, answer.read())
        except (ConnectionError, http.client.HTTPException):
            return Reply(0, http.client.HTTPMessage(), b"")
        finally:
            answer.close()
