"""The HTTP protocol of uvicorn, with what it lacks: a bound on request heads, and a patient end of connections."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenauth.transport import one_piece

MAX_HEAD = 16 * 1024
"""Bytes of a request line and its headers; more are answered 431."""

DRAIN = 1.0
"""Seconds that an idle connection stays open at shutdown: a request may be on its way."""

_CLOSE = (b"connection", b"close")


def _last_words(status: str, why: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n"
    return f"{head}content-length: {len(why)}\r\n\r\n{why}".encode()


_TOO_LARGE = _last_words("431 Request Header Fields Too Large", "The request headers are larger than 16 KiB.")
_NOBODY = _last_words(
    '401 Unauthorized\r\nwww-authenticate: Bearer realm="tokenauth"', "The request headers are too large or broken."
)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses heads that are too long before they are kept, and loses no request at shutdown.

    uvicorn keeps whatever comes, and closes idle connections at once: a request that was sent at that moment
    would never be answered. Here it is, and told that the connection closes.
    """

    _head = 0
    url = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(one_piece(transport, self.loop))

    def data_received(self, data: bytes) -> None:
        """Take what has arrived. Nearly always that is a whole request, for which this costs a look."""
        if len(data) > MAX_HEAD and self._head_begins() and data.find(b"\r\n\r\n", 0, MAX_HEAD) < 0:
            self._refuse(self.url if self._head else data.partition(b" ")[2].partition(b" ")[0])
            return
        HttpToolsProtocol.data_received(self, data)
        if self.scope is not None and "method" not in self.scope:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(self.url)
        elif self._head:
            self._head = 0

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        if _is_forward_auth(self.url):
            self._refuse(self.url)
        else:
            super().send_400_response(msg)

    def shutdown(self) -> None:
        """Close the connection after the next answer, or when none is asked for."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        state = self.server_state
        if _CLOSE not in state.default_headers:
            state.default_headers = [*state.default_headers, _CLOSE]
        self.loop.call_later(DRAIN, super().shutdown)

    def _head_begins(self) -> bool:
        """Whether no body is being received."""
        return self.cycle is None or not self.cycle.more_body

    def _refuse(self, target: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(_NOBODY if _is_forward_auth(target) else _TOO_LARGE)
            self.transport.close()


def _is_forward_auth(target: bytes) -> bool:
    """Whether a reverse proxy asks, with the headers of its client: it is to hear 401 whatever they hold."""
    return target == b"/auth" or target.startswith(b"/auth?")
