"""A TCP proxy between a service and its database that a test can delay, cut and freeze."""

import asyncio
import re
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, Literal, NamedTuple, TypeVar

from tests.support.ports import free_port

# Not UNLISTEN, which a pool sends on every connection that is returned to it.
_LISTEN = re.compile(rb"(?<!UN)LISTEN\s")

_T = TypeVar("_T")
_Queue = asyncio.Queue[tuple[float, bytes | None]]


class Connection:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.server_port = 0
        """The client port that PostgreSQL sees: `client_port` in pg_stat_activity."""
        self.listens = False
        """Whether the client has sent LISTEN."""
        self.round_trips = 0
        """How often the client has sent something, and then waited for the answer."""
        self._tail = b""
        self._asked = False

    def see(self, data: bytes) -> None:
        """Look at what the client sends: search for LISTEN, and count a round trip unless one has begun."""
        self.round_trips += not self._asked
        self._asked = True
        self.listens = self.listens or _LISTEN.search(self._tail + data) is not None
        self._tail = (self._tail + data)[-8:]

    def see_answer(self) -> None:
        """Look at what the server sends: what the client sends next is another round trip."""
        self._asked = False

    def reset(self) -> None:
        """Make `close` reset the connection at both ends."""
        for end in filter(None, (self.client, self.server)):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        for end in filter(None, (self.client, self.server)):
            end.close()


Only = Callable[[Connection], bool]


def every(connection: Connection) -> bool:
    return True


def listener(connection: Connection) -> bool:
    """Select the connections on which a LISTEN was sent."""
    return connection.listens


class _Rule(NamedTuple):
    """What to do with which connections."""

    kind: Literal["pass", "cut", "freeze"]
    only: Only


class Proxy:
    """Forwards all connections from its port to another. Each method takes effect before it returns."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target = ("127.0.0.1", target_port)
        self._open: dict[Connection, asyncio.Task[None]] = {}
        self._rule = _Rule("pass", every)
        self._delay: tuple[float, Only] = (0, every)
        self._listening: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> list[Connection]:
        """The open connections."""
        return self._do(self._list())

    def delay(self, seconds: float, only: Only = every) -> None:
        """Delay all bytes in both directions. They keep their order."""
        self._do(self._set(self._rule, (seconds, only)))

    def cut(self, only: Only = every) -> None:
        """Reset connections. Without `only`, refuse new ones; with it, reset each one as soon as it matches."""
        self._do(self._set(_Rule("cut", only), self._delay))

    def freeze(self, only: Only = every) -> None:
        """Hold back all data, also the close of an end. New connections are accepted and frozen, too."""
        self._do(self._set(_Rule("freeze", only), self._delay))

    def heal(self) -> None:
        """Forward everything, also the data that was held back."""
        self._do(self._set(_Rule("pass", every), (0, every)))

    def _do(self, what: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    async def _list(self) -> list[Connection]:
        return list(self._open)

    async def _set(self, rule: _Rule, delay: tuple[float, Only]) -> None:
        self._rule, self._delay = rule, delay
        self._changed.set()
        self._changed = asyncio.Event()
        self._listen(rule != _Rule("cut", every))
        ended = [task for connection, task in self._open.items() if self._is("cut", connection)]
        for task in ended:
            task.cancel()
        if ended:
            await asyncio.wait(ended)

    def _is(self, kind: str, connection: Connection) -> bool:
        return self._rule.kind == kind and self._rule.only(connection)

    def _listen(self, wanted: bool) -> None:
        """Accept new connections, or refuse them."""
        if wanted and self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port), backlog=512)
            self._listening.setblocking(False)
            self._loop.add_reader(self._listening, self._accept, self._listening)
        elif not wanted and self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            connection = Connection(_quick(listening.accept()[0]))
            task = self._open[connection] = self._loop.create_task(self._serve(connection))
            task.add_done_callback(partial(self._end, connection))

    def _end(self, connection: Connection, task: asyncio.Task[None]) -> None:
        """Close the connection, also if its task was cancelled before it began."""
        if task.cancelled():
            connection.reset()
        connection.close()
        del self._open[connection]

    async def _serve(self, connection: Connection) -> None:
        """Forward both ways until both ends have closed, or one fails."""
        try:
            await self._passage(connection, self._loop.time())
            connection.server = server = _quick(socket.socket())
            await self._loop.sock_connect(server, self._target)
            connection.server_port = server.getsockname()[1]
            async with asyncio.TaskGroup() as tasks:
                for source, target in ((connection.client, server), (server, connection.client)):
                    queue: _Queue = asyncio.Queue()
                    tasks.create_task(self._read(connection, source, queue))
                    tasks.create_task(self._write(connection, queue, target))
        except BaseException as error:
            connection.reset()
            if not isinstance(error, OSError | ExceptionGroup):
                raise

    async def _read(self, connection: Connection, source: socket.socket, queue: _Queue) -> None:
        data: bytes | None = b"..."
        while data:
            try:
                data = await self._loop.sock_recv(source, 65536)
            except OSError:
                data = None
            if data and source is connection.client:
                connection.see(data)
                if self._is("cut", connection):
                    raise ConnectionResetError
            elif data:
                connection.see_answer()
            queue.put_nowait((self._loop.time(), data))

    async def _write(self, connection: Connection, queue: _Queue, target: socket.socket) -> None:
        data: bytes | None = b"..."
        while data:
            arrived, data = await queue.get()
            await self._passage(connection, arrived)
            if data is None:
                raise ConnectionResetError
            if data:
                await self._loop.sock_sendall(target, data)
        target.shutdown(socket.SHUT_WR)

    async def _passage(self, connection: Connection, arrived: float) -> None:
        """Wait while data that arrived at `arrived` is held back."""
        while True:
            seconds, only = self._delay
            late = arrived + seconds - self._loop.time() if only(connection) else 0
            frozen = self._is("freeze", connection)
            if not frozen and late <= 0:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(None if frozen else late):
                    await self._changed.wait()


def _quick(end: socket.socket) -> socket.socket:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end
