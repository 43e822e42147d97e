"""The HTTP protocol of uvicorn, with what it lacks: a bound on request heads, and a patient end of connections."""

import asyncio
from collections import deque
from urllib.parse import unquote, urlsplit

from httptools import HttpParserError, HttpParserUpgrade
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenauth.transport import one_piece

MAX_HEAD = 16 * 1024
"""Bytes of a request line and its headers, and of what comes after a body; more are answered 431."""

DRAIN = 1.0
"""Seconds that an idle connection stays open at shutdown: a request may be on its way."""

_CLOSE = (b"connection", b"close")


def _last_words(status: str, why: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n"
    return f"{head}content-length: {len(why)}\r\n\r\n{why}".encode()


_TOO_LARGE = _last_words("431 Request Header Fields Too Large", "The request headers are larger than 16 KiB.")
_BROKEN = _last_words("400 Bad Request", "Invalid HTTP request received.")
_NOBODY = _last_words(
    '401 Unauthorized\r\nwww-authenticate: Bearer realm="tokenauth"', "The request headers are too large or broken."
)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses heads that are too long before they are kept, and loses no request at shutdown.

    uvicorn keeps whatever comes, takes what follows a body for headers, and closes idle connections at once: a request
    that was sent at that moment would never be answered. Here it is, and told that the connection closes.
    """

    url = b""
    _begun: HTTPScope | None = None
    _unfinished = 0
    _after_chunk = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(one_piece(transport, self.loop))

    def data_received(self, data: bytes) -> None:
        """Take what has arrived. Nearly always that is a whole request, for which this costs a look."""
        if len(data) > MAX_HEAD:
            self._take_pieces(data)
            return
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                break
            except HttpParserUpgrade as upgrade:  # nothing else is spoken here: what follows is HTTP
                data = data[upgrade.args[0] :]
            except HttpParserError:
                self._refuse(_BROKEN, self.url or data.partition(b" ")[2].partition(b" ")[0])
                return
        if self._after_chunk or (self.scope is not None and "method" not in self.scope):
            if self.scope is not self._begun:  # what came before it was whole
                self._begun, self._unfinished = self.scope, -data.rfind(b"\r\n\r\n")
            self._unfinished += len(data)
            if self._unfinished > MAX_HEAD:
                self._refuse(_TOO_LARGE, self.url)
        elif self._unfinished:
            self._begun, self._unfinished = None, 0

    def on_chunk_header(self) -> None:
        """Take no more headers of this request: what follows the last chunk (RFC 9112 section 7.1.2) is none."""
        self.headers = deque(maxlen=0)  # type: ignore[assignment]
        self._after_chunk = True

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._after_chunk = False
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        """End a chunk; the last one, after what follows it."""
        self._after_chunk = False

    def shutdown(self) -> None:
        """Close the connection after the next answer, or when none is asked for."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        state = self.server_state
        if _CLOSE not in state.default_headers:
            state.default_headers = [*state.default_headers, _CLOSE]
        self.loop.call_later(DRAIN, super().shutdown)

    def _take_pieces(self, data: bytes) -> None:
        """Take so much that a head which is too long may be in it, and go no further than its first piece."""
        begins = self.cycle is None or not self.cycle.more_body
        too_long = begins and data.find(b"\r\n\r\n", 0, MAX_HEAD) < 0
        for start in range(0, len(data), MAX_HEAD):
            self.data_received(data[start : start + MAX_HEAD])
            if too_long:
                self._refuse(_TOO_LARGE, self.url)
            if self.transport.is_closing():
                return

    def _refuse(self, words: bytes, target: bytes) -> None:
        """Close the connection, and say why to whoever waits for an answer to what is refused."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and (self.pipeline or not cycle.more_body):
            self.parser = _Deaf()  # type: ignore[assignment]
            cycle.keep_alive = False  # it is the next request that is refused; this one is answered first
            if cycle.more_body:  # it is this one, and others are answered first
                cycle.disconnected = True
                self.pipeline[0] = cycle, self._hang_up
            return
        if not (self._after_chunk and cycle.response_complete):
            self.transport.write(_NOBODY if _is_forward_auth(target) else words)
        self.transport.close()

    async def _hang_up(self, *_: object) -> None:
        """Close the connection in its turn: an ASGI app."""
        self.transport.close()


class _Deaf:
    """A parser of a connection that is about to be closed."""

    def feed_data(self, data: bytes) -> None:
        """Take nothing more."""


def _is_forward_auth(target: bytes) -> bool:
    """Whether a reverse proxy asks, with the headers of its client: it is to hear 401 whatever they hold."""
    try:
        return unquote(urlsplit(target.decode("latin-1")).path) == "/auth"
    except ValueError:
        return False
