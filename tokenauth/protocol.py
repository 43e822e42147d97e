"""The HTTP parser of uvicorn, with the bound on request heads that it lacks."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 16 * 1024
"""Bytes of a request line and its headers; more are answered 431."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 43\r\n\r\nThe request headers are larger than 16 KiB."
)


class BoundedProtocol(HttpToolsProtocol):
    """Refuses heads that are too long before they are kept: uvicorn would keep whatever comes."""

    _head = 0

    def data_received(self, data: bytes) -> None:
        """Take what has arrived. Nearly always that is a whole request, for which this costs a look."""
        if len(data) > MAX_HEAD and self._head_begins() and data.find(b"\r\n\r\n", 0, MAX_HEAD) < 0:
            self._refuse()
            return
        super().data_received(data)
        scope = self.scope
        if scope is None or "method" in scope:
            self._head = 0
            return
        self._head += len(data)
        if self._head > MAX_HEAD:
            self._refuse()

    def _head_begins(self) -> bool:
        """Whether no body is being received."""
        return self.cycle is None or not self.cycle.more_body

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()
