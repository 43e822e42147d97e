"""Wrappers around the transport of a connection, which decide when data is sent and how the connection is closed."""

import asyncio
from typing import Any, cast

MAX_HELD = 64 * 1024
"""Maximum bytes that are kept until the end of the iteration."""

LINGER = 2.0
"""Seconds that a client has to read its last answer while it still sends, before the connection is reset."""

FLUSH = 60.0
"""Seconds that a client has to read what was sent before the connection was closed."""

MAX_DISCARDED = 8 * 1024 * 1024
"""Bytes to read and discard after the last answer. Closing earlier would reset the connection and lose the answer."""


class CoalescingTransport:
    """Sends what is written in one iteration of the event loop with one system call.

    This is written so that it can be proposed to uvicorn; it depends on nothing else here.

    The problem: `RequestResponseCycle.send` calls `transport.write` once for the head of an answer and once for its
    body. asyncio and uvloop send each of them at once. So each small answer takes two system calls, leaves in two TCP
    segments, and wakes the client twice.

    The fix: `connection_made` of the protocol wraps the transport.

        self.transport = CoalescingTransport(transport, self.loop)

    `write` keeps the data. The first `write` of an iteration schedules one callback, which sends all of it together. At
    most MAX_HELD bytes are kept, so the memory of a connection and its flow control stay bounded as before. Everything
    else is passed to the transport.
    """

    __slots__ = ("_closing", "_held", "_loop", "_size", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._size = 0
        self._closing = False

    def write(self, data: bytes) -> None:
        """Send data at the end of this iteration, or at once if too much is kept."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._size += len(data)
        if self._size > MAX_HELD:
            self._flush()

    def close(self) -> None:
        """Send what is kept, then close."""
        self._flush()
        self._closing = True
        self._transport.close()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        """Pass everything else to the transport."""
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._size = self._held, [], 0
            if not self.is_closing():  # uvloop raises RuntimeError for the next answer to a client that is gone
                self._transport.write(b"".join(held))


class LingeringTransport(CoalescingTransport):
    """Closes a connection so that the client can read the last answer, within a time limit.

    Set `lingers` while the client may still be sending. `close` then ends only this side of the connection, and
    discards what arrives for LINGER seconds more; for FLUSH seconds if a part of the answer is not sent yet. Closing
    both sides at once would reset the connection, and the client could lose the answer (RFC 9112 section 9.6).
    """

    __slots__ = ("lingers",)

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(transport, loop)
        self.lingers = False

    def close(self) -> None:
        """Send what is kept, then close. Reset the connection if the client does not read it in time."""
        if self.is_closing():
            return
        self._flush()
        self._closing = True
        transport = self._transport
        unsent = transport.get_write_buffer_size()
        lingers = (self.lingers or unsent) and transport.can_write_eof()
        if lingers:
            transport.write_eof()
            transport.set_protocol(cast(asyncio.Protocol, _Discarding(transport)))
            transport.resume_reading()
        else:
            transport.close()
        if lingers or unsent:
            self._loop.call_later(FLUSH if unsent else LINGER, transport.abort)

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self._closing = True
        self._transport.abort()


class _Discarding:
    """Replaces `data_received` of a protocol whose last answer was given: discards what arrives, up to a limit."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._protocol = transport.get_protocol()
        self._left = MAX_DISCARDED

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def __getattr__(self, name: str) -> Any:
        """Pass everything else to the protocol."""
        return getattr(self._protocol, name)
