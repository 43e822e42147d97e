"""How a worker takes its connections: several in each turn of the event loop, none lost at the end.

libuv accepts one connection in each turn, and a turn takes as long as the requests of all busy connections: beside
3,000 of those, a new one waited 10 s. And connections that wait to be accepted are reset when their socket is closed.
"""

import asyncio
import ctypes
import errno
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tokenauth import file_descriptors
from tokenauth.logs import log

SHARE = 8
"""One connection is accepted in each turn of the event loop, and one more for so many that are open.

With those the turn grows, and accepting goes on taking its part of it. With few of them a worker leaves some of a small
burst to the others: the 20 connections of a reverse proxy are not to end up in the one that woke first.
"""

LINGER = 0.2
"""Seconds in which a worker that is told to stop still accepts: a handshake may be half done."""

_PAUSE = 0.05
"""Seconds until accepting is tried again for which something was lacking."""

_QUIET = 60.0
"""Seconds between two log lines that say that descriptors are short."""

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class ConnectionClose(ServerState):
    """What connections know of their server, for those that are answered once and then closed."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        super().__init__()
        self.connections = state.connections
        self.tasks = state.tasks

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that every answer has; the last one closes the connection."""
        return [*self._state.default_headers, (b"connection", b"close")]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        pass


class Acceptor:
    """Accepts the connections of one listening socket, which other processes may accept from as well.

    While file descriptors are short, a new connection is answered once and closed, and those that are kept go on.
    """

    def __init__(
        self, listener: socket.socket, protocol: Callable[[ServerState], HttpToolsProtocol], state: ServerState
    ) -> None:
        """Accept from now on; `protocol` makes what speaks to a client."""
        listener.setblocking(False)
        self.sockets = (listener,)
        self._listener = listener
        self._protocol = protocol
        self._state = state
        self._once = ConnectionClose(state)
        self._once_only: list[HttpToolsProtocol] = []
        self._beginning: set[asyncio.Task[object]] = set()
        self._loop = asyncio.get_running_loop()
        self._noted_at = -_QUIET
        self._short = False
        self._open = True
        self._loop.add_reader(listener, self._accept_some)

    async def drain(self, seconds: float = LINGER) -> None:
        """Accept for a moment more, and all that waits then; the socket is closed when this has returned."""
        await asyncio.sleep(seconds)
        while self._accept():
            pass
        self.close()
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def close(self) -> None:
        """Accept nothing more."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return: for uvicorn, which waits for what it closes."""

    def _accept_some(self) -> None:
        for _ in range(1 + len(self._state.connections) // SHARE):
            if not self._accept():
                return

    def _accept(self) -> bool:
        """Accept one connection; False if none waits, or none can be taken."""
        if self._once_only and not self._has_room():
            self._pause()
            return False
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._note(short=True)
                self._pause()
                return False
            return True  # this client has gone again (ECONNABORTED, or what its network has reported)
        short = file_descriptors.in_reserve(connection.fileno())
        self._note(short)
        protocol = self._protocol(self._once if short else self._state)
        if short:
            self._once_only.append(protocol)
        beginning = self._loop.create_task(self._begin(protocol, connection))
        self._beginning.add(beginning)
        beginning.add_done_callback(self._beginning.discard)
        return True

    async def _begin(self, protocol: HttpToolsProtocol, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except (OSError, MemoryError):  # the client has gone again, or there is no memory for one more
            connection.close()

    def _has_room(self) -> bool:
        """Whether one more can be answered once. Where too many are, the oldest without a whole request is closed."""
        self._once_only = [one for one in self._once_only if one.transport is None or not one.transport.is_closing()]
        if len(self._once_only) < file_descriptors.reserve() // 4:
            return True
        for one in self._once_only:
            if one.transport is not None and _waits_for_its_client(one.cycle):
                one.transport.close()
                return True
        return False

    def _pause(self) -> None:
        if self._open:
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_PAUSE, self._resume)

    def _resume(self) -> None:
        if self._open:
            self._loop.add_reader(self._listener, self._accept_some)

    def _note(self, short: bool) -> None:
        """Log that descriptors are short, at most once a minute, and that they no longer are."""
        if short and not self._short and monotonic() - self._noted_at > _QUIET:
            self._noted_at = monotonic()
            self._short = True
            log.error(
                "file_descriptors_short",
                limit=file_descriptors.limit(),
                connections=len(self._state.connections),
                action="raise LimitNOFILE of the service, or ulimit -n",
            )
        elif self._short and not short:
            self._short = False
            log.info("file_descriptors_free_again", connections=len(self._state.connections))


def _waits_for_its_client(cycle: RequestResponseCycle | None) -> bool:
    """Whether a connection waits for a request, or for more of it, rather than for the answer."""
    return cycle is None or cycle.response_complete or (cycle.more_body and not cycle.response_started)


class AcceptingServer(uvicorn.Server):
    """uvicorn's server, with an Acceptor for each of the sockets that it is given."""

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Start the application, then accept."""
        await super().startup([])
        protocol = cast(type[HttpToolsProtocol], self.config.http_protocol_class)

        def create(state: ServerState) -> HttpToolsProtocol:
            return protocol(self.config, state, self.lifespan.state)

        self._acceptors = [Acceptor(listener, create, self.server_state) for listener in sockets or ()]
        self.servers = cast(list[Any], self._acceptors)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what waits, then stop as uvicorn does."""
        await asyncio.gather(*(acceptor.drain() for acceptor in self._acceptors))
        await super().shutdown(sockets)


def stop_handshakes(listener: socket.socket) -> None:
    """Let nobody begin to connect any more, here or where the socket is shared; what is queued can be accepted.

    Linux drops the first packet (SYN) of a new connection. The client sends it again after a second: by then the
    socket is closed and it is refused, or the next server has the port. Without this a connection could enter the
    queue after the last look at it, and be reset with the socket. On other systems than Linux, that remains.
    """
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(memory))
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


_SO_ATTACH_FILTER = 26

_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that has the flags
    (0x54, 0, 0, 0x12),  # of these SYN and ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    (0x06, 0, 0, 0),  # then drop the packet
    (0x06, 0, 0, 0xFFFF),  # else let it pass
)
"""A program of the classic Berkeley Packet Filter."""
