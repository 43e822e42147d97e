"""How a worker accepts connections: several in each iteration of the event loop, and none is lost when it stops.

libuv accepts one connection per iteration, and an iteration takes as long as the requests of all busy connections: with
3,000 of them, a new connection waited for 10 seconds. Also, connections in the queue are reset when the listening
socket is closed.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tokenauth import file_descriptors
from tokenauth.logs import log
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.server.tls import HANDSHAKE_TIMEOUT
from tokenauth.server.transport import FLUSH

OPEN_PER_ACCEPT = 8
"""In each iteration of the event loop, one connection is accepted, and one more for each 8 that are open.

The more connections are open, the longer an iteration takes. So accepting scales with the load. A worker with few
connections leaves most of a small burst to the others: the 20 connections of a reverse proxy should not all go to the
worker that woke up first.
"""

LINGER = 0.2
"""Seconds in which a worker that stops still accepts, since a handshake may be half done."""

CUT_OFF = 5
"""Seconds before the end of a stop at which unanswered requests get 503: a log-out still has time to be written."""

_LAST_HANDSHAKES = 2.0
"""Seconds in which a worker that stops still completes TLS handshakes."""

_RETRY = 0.05
"""Seconds until the next attempt to accept, when file descriptors or memory are short."""

_LOG_INTERVAL = 60.0
"""Seconds between two log lines about a shortage of descriptors."""

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class _ClosingState(ServerState):
    """The server's state for connections that are closed after one answer."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        super().__init__()
        self.connections = state.connections
        self.tasks = state.tasks

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The server's default headers, and one that closes the connection."""
        return [*self._state.default_headers, (b"connection", b"close")]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        pass


class Acceptor:
    """Accepts the connections of a listening socket, which other processes may share.

    While file descriptors are short, it answers each new connection once and closes it. Open connections stay open.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[ServerState], HttpToolsProtocol],
        state: ServerState,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Accept from now on. `protocol` creates the protocol of a connection."""
        listener.setblocking(False)
        self.sockets = (listener,)
        self._listener = listener
        self._protocol = protocol
        self._state = state
        self._tls: dict[str, Any] = {}
        if tls is not None:
            # The transport ends connections before FLUSH, when all is sent.
            times = {"ssl_handshake_timeout": HANDSHAKE_TIMEOUT, "ssl_shutdown_timeout": 2 * FLUSH}
            self._tls = {"ssl": tls, **times}
        self._closing_state = _ClosingState(state)
        self._answered_once: dict[HttpToolsProtocol, socket.socket] = {}  # the oldest first
        self._connecting: dict[asyncio.Task[None], socket.socket] = {}
        self._loop = asyncio.get_running_loop()
        self._logged_at = -_LOG_INTERVAL
        self._short = False
        self._open = True
        self._loop.add_reader(listener, self._accept_some)

    async def drain(self, seconds: float = LINGER) -> None:
        """Accept for a little longer, then empty the queue and close the socket."""
        await asyncio.sleep(seconds)
        while self._accept():
            pass
        self.close()
        if self._connecting:
            _, slow = await asyncio.wait(self._connecting, timeout=_LAST_HANDSHAKES)
            for task in slow:
                _shut_down(self._connecting[task])

    def close(self) -> None:
        """Accept no more connections."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Do nothing: uvicorn calls this on each of its servers, and `close` has already closed this one."""

    def _accept_some(self) -> None:
        for _ in range(1 + len(self._state.connections) // OPEN_PER_ACCEPT):
            if not self._accept() or self._is_full():
                return

    def _accept(self) -> bool:
        """Accept one connection; return False if none waits, or none can be accepted."""
        oldest = None
        if self._is_full():
            oldest = next(filter(self._waits_for_client, self._answered_once), None)
            if oldest is None:
                self._pause()
                return False
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._log_shortage(short=True)
                self._pause()
                return False
            return True  # this client has disconnected (ECONNABORTED), or its network reported an error
        short = file_descriptors.in_reserve(connection.fileno())
        self._log_shortage(short)
        protocol = self._protocol(self._closing_state if short else self._state)
        if connection.family != socket.AF_UNIX:
            protocol.client = address[:2]
        if short and oldest is not None:
            self._end(oldest)
        task = self._loop.create_task(self._connect(protocol, connection))
        self._connecting[task] = connection
        task.add_done_callback(self._connecting.pop)
        if short:
            self._answered_once[protocol] = connection
        return True

    async def _connect(self, protocol: HttpToolsProtocol, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, **self._tls)
        except BaseException as error:
            connection.close()
            self._answered_once.pop(protocol, None)
            if not isinstance(error, OSError | MemoryError):  # it has disconnected or speaks no TLS; memory is short
                raise

    def _is_full(self) -> bool:
        """Return whether no more connections can be answered once. Each counts until its descriptor is free."""
        if not self._answered_once:
            return False
        open_ones = self._state.connections
        for protocol in [each for each in self._answered_once if each.transport is not None and each not in open_ones]:
            del self._answered_once[protocol]
        return len(self._answered_once) >= file_descriptors.reserve() // 4

    def _waits_for_client(self, protocol: HttpToolsProtocol) -> bool:
        """Return whether a connection waits for its client to send or to read, and not for the server to answer."""
        if protocol.transport is None:
            return bool(self._tls)  # the handshake
        cycle = protocol.cycle
        if cycle is None or cycle.response_complete or protocol.transport.is_closing():
            return True
        return cycle.more_body and not cycle.response_started

    def _end(self, protocol: HttpToolsProtocol) -> None:
        """End a connection at once."""
        connection = self._answered_once.pop(protocol)
        if protocol.transport is None:
            _shut_down(connection)
        else:
            protocol.transport.abort()

    def _pause(self) -> None:
        if self._open:
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_RETRY, self._resume)

    def _resume(self) -> None:
        if self._open:
            self._loop.add_reader(self._listener, self._accept_some)

    def _log_shortage(self, short: bool) -> None:
        """Log the start of a shortage of descriptors, at most once a minute, and its end."""
        if short and not self._short and monotonic() - self._logged_at > _LOG_INTERVAL:
            self._logged_at = monotonic()
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


def _shut_down(connection: socket.socket) -> None:
    """End a connection that may not have been made yet. To cancel its task would not always end its protocol."""
    with suppress(OSError):  # its client has disconnected
        connection.shutdown(socket.SHUT_RDWR)


class AcceptingServer(uvicorn.Server):
    """uvicorn's server, with an Acceptor for each of its sockets."""

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup([])
        protocol = cast(type[HttpToolsProtocol], self.config.http_protocol_class)

        def create(state: ServerState) -> HttpToolsProtocol:
            return protocol(self.config, state, self.lifespan.state)

        self._acceptors = [Acceptor(listener, create, self.server_state, self.config.ssl) for listener in sockets or ()]
        self.servers = cast(list[Any], self._acceptors)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what is queued, then stop as uvicorn does. Shortly before its timeout, answer 503 to what is left."""
        loop, timers = asyncio.get_running_loop(), []
        if self.config.timeout_graceful_shutdown is not None:
            grace = self.config.timeout_graceful_shutdown - CUT_OFF
            timers = [loop.call_later(grace, self._cut_off), loop.call_later(grace + 1, self._cancel)]
        await self.drain()
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()

    async def drain(self) -> None:
        """Accept the connections that are queued, and no more."""
        await asyncio.gather(*(acceptor.drain() for acceptor in self._acceptors))

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.cut_off()

    def _cancel(self) -> None:
        """Cancel the requests that are still running: the application answers 503."""
        for task in self.server_state.tasks:
            task.cancel()
