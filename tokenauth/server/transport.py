"""A transport that sends in one piece what is written in one turn of the event loop."""

import asyncio
from typing import Any

_PATIENCE = 64 * 1024
"""Bytes that are held back at the most."""


LINGER = 2.0
"""Seconds that a client has to read its last answer while it still sends, before the connection is reset."""

FLUSH = 60.0
"""Seconds that a client has to read what was sent before the connection was closed."""


class OnePiece:
    """Wraps a transport: head and body of an answer leave with one system call and arrive in one segment.

    uvicorn writes them one after the other, and each write wakes up the reader. The answers of one turn also
    leave together, at its end: a client with many connections is woken once for all of them.

    `lingers` says that the client may still be sending when the transport is closed. It then ends only its own side
    and goes on reading for a while: to close at once would reset the connection, and the answer could be lost
    (RFC 9112 section 9.6).
    """

    __slots__ = ("_closing", "_held", "_loop", "_size", "_transport", "lingers")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._size = 0
        self._closing = False
        self.lingers = False

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn, or now if too much is held back."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._size += len(data)
        if self._size > _PATIENCE:
            self._flush()

    def close(self) -> None:
        """Send what is held back, then close. The connection is reset if the client does not read it in time."""
        if self.is_closing():
            return
        self._flush()
        self._closing = True
        if self.lingers and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER, self._transport.abort)
            return
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(FLUSH, self._transport.abort)

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self._closing = True
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether the transport is closing or closed."""
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the transport."""
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._size = self._held, [], 0
            if not self._closing:
                self._transport.write(b"".join(held))
