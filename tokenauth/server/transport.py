"""Wrappers around the transport of a connection, which decide when data is sent and how the connection is closed."""

import asyncio
import fcntl
import struct
import termios
from typing import Any, cast

MAX_HELD = 64 * 1024
"""Maximum bytes that are kept until the end of the iteration."""

LINGER = 2.0
"""Seconds that a client which still sends has to read its last answer once it is sent. Then the connection is reset.

A client has as long to end TLS, which idle ones do not do.
"""

FLUSH = 60.0
"""Seconds that a client has to read what was sent before the connection was closed."""

_AGAIN = 0.1
"""Seconds after which the event loop has sent what it could, if the kernel had nothing more to send."""

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

    `close` closes both sides as soon as all is sent, which may take FLUSH seconds. Set `lingers` while the client may
    still be sending: then it ends only this side, and closes after LINGER seconds more. Closing both at once would
    reset the connection, and the client could lose the answer (RFC 9112 section 9.6).

    From `close` on, what arrives is discarded. With TLS, only until all is sent.
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
        if self.lingers or self._transport.get_write_buffer_size() or not self._transport.can_write_eof():
            _LastAnswer(self, self._transport, self._loop)
        else:
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self._closing = True
        self._transport.abort()


class _LastAnswer:
    """Replaces the protocol of a connection until it is closed: discards what arrives, up to a limit."""

    def __init__(
        self, wrapper: LingeringTransport, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._wrapper = wrapper
        self._transport = transport
        self._loop = loop
        self._protocol = transport.get_protocol()
        self._left = MAX_DISCARDED
        self._deadline = loop.time() + FLUSH
        self._timer = loop.call_at(self._deadline, transport.abort)
        transport.set_protocol(cast(asyncio.Protocol, self))
        transport.resume_reading()
        if transport.get_write_buffer_size():
            transport.set_write_buffer_limits(0)  # so that `resume_writing` is called when all is sent
        else:
            self._end()

    def data_received(self, data: bytes) -> None:
        self._wrapper.lingers = True
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()
        self._loop.call_soon(self._end)  # asyncio would report the end twice if it were closed here

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._protocol.connection_lost(exc)

    def __getattr__(self, name: str) -> Any:
        """Pass everything else to the protocol."""
        return getattr(self._protocol, name)

    def _end(self) -> None:
        """Close, now that all is sent; only this side, if the client may still be sending."""
        if self._transport.is_closing():
            return
        if not self._transport.can_write_eof():
            self._timer.cancel()
            self._timer = self._loop.call_later(LINGER, self._end_tls)
            self._transport.close()
        elif self._wrapper.lingers:
            self._timer.cancel()
            self._timer = self._loop.call_later(LINGER, self._transport.abort)
            self._transport.write_eof()
        else:
            self._transport.close()

    def _end_tls(self, was_sent: bool = False) -> None:
        """Close a connection whose client does not end TLS, when all is sent.

        The transport of TLS does not say what the one below it has not sent. But while that has something to send, so
        has the kernel, except for the moment until the event loop gives it more.
        """
        sent = not _unsent(self._transport)
        if (sent and was_sent) or self._loop.time() >= self._deadline:
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(_AGAIN if sent else LINGER, self._end_tls, sent)


def _unsent(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel has that the client has not received; 0 where that is not known."""
    connection = transport.get_extra_info("socket")
    if connection is None:  # it is closed
        return 0
    try:
        answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return 0
    return int(struct.unpack("i", answer)[0])
