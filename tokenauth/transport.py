"""A transport that sends in one piece what is written in one turn of the event loop."""

import asyncio
from typing import Any, cast

_PATIENCE = 64 * 1024
"""Bytes that are held back at the most."""


class OnePiece:
    """Wraps a transport: head and body of an answer leave with one system call and arrive in one segment.

    uvicorn writes them one after the other, and each write wakes up whoever reads. The answers of one turn also
    leave together, at its end: a client with many connections is woken once for all of them.
    """

    __slots__ = ("_held", "_loop", "_size", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn, or now if too much is held back."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._size += len(data)
        if self._size > _PATIENCE:
            self._flush()

    def close(self) -> None:
        """Send what is held back, then close."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the transport is closing or closed."""
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the transport."""
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._size = self._held, [], 0
            self._transport.write(b"".join(held))


def one_piece(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> asyncio.Transport:
    """Wrap a transport."""
    return cast(asyncio.Transport, OnePiece(transport, loop))
