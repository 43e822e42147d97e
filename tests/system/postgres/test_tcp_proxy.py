"""The proxy of tests/support/tcp_proxy.py delays, cuts and freezes connections."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import asyncpg
import pytest

from tests.support.postgres import Cluster
from tests.support.tcp_proxy import Proxy, every, listener
from tests.system.postgres.test_cluster import BROKEN

pytestmark = pytest.mark.faults

HOUR = 3600


class Ends:
    """Both ends of connections through a proxy: the client's and the server's."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.server = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.server.settimeout(20)
        self.proxy = self._stack.enter_context(Proxy(self.server.getsockname()[1]))

    def connect(self) -> socket.socket:
        """Open the client's end."""
        client = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.proxy.port), 20))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def pair(self) -> tuple[socket.socket, socket.socket]:
        return self.connect(), self.accept()

    def accept(self) -> socket.socket:
        """Accept the server's end of the next connection."""
        accepted = self._stack.enter_context(self.server.accept()[0])
        accepted.settimeout(20)
        return accepted

    def listening(self) -> tuple[socket.socket, socket.socket]:
        """Open a connection and send LISTEN on it."""
        client, server = self.pair()
        client.sendall(b"LISTEN news")
        assert read(server, 11) == b"LISTEN news"
        return client, server

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Run a proxy in front of a server that the test controls."""
    made = Ends()
    yield made
    made.close()


def read(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more, f"closed after {data!r}"
        data += more
    return data


def receives_nothing(end: socket.socket) -> bool:
    """Whether nothing arrives, not even the end, for 0.1 seconds: far longer than an answer takes."""
    end.settimeout(0.1)
    try:
        end.recv(1)
    except TimeoutError:
        return True
    finally:
        end.settimeout(20)
    return False


def test_data_and_its_end_pass_in_both_directions(ends: Ends) -> None:
    client, server = ends.pair()
    payload = bytes(range(256)) * 4000
    client.sendall(payload)
    client.shutdown(socket.SHUT_WR)
    assert read(server, len(payload)) == payload
    assert server.recv(1) == b""
    server.sendall(b"answer")
    server.close()
    assert read(client, 6) == b"answer"
    assert client.recv(1) == b""


def test_a_reset_by_one_end_reaches_the_other(ends: Ends) -> None:
    client, server = ends.pair()
    [connection] = ends.proxy.connections
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    assert connection not in ends.proxy.connections


def test_a_delay_applies_at_once_in_both_directions(ends: Ends) -> None:
    client, server = ends.pair()
    ends.proxy.delay(HOUR)
    client.sendall(b"question")
    server.sendall(b"answer")
    assert receives_nothing(server)
    assert receives_nothing(client)
    ends.proxy.delay(0.01)
    assert read(server, 8) == b"question"
    assert read(client, 6) == b"answer"


def test_delayed_data_keeps_its_order(ends: Ends) -> None:
    client, server = ends.pair()
    ends.proxy.delay(0.02)
    for number in range(50):
        client.sendall(b"%02d" % number)
    assert read(server, 100) == b"".join(b"%02d" % number for number in range(50))


def test_a_cut_resets_and_refuses_until_it_heals(ends: Ends) -> None:
    client, server = ends.pair()
    ends.proxy.cut()
    for end in (client, server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with pytest.raises(ConnectionRefusedError):
        ends.connect()
    assert ends.proxy.connections == []
    ends.proxy.heal()
    client, server = ends.pair()
    client.sendall(b"again")
    assert read(server, 5) == b"again"


def test_a_frozen_connection_hides_its_end(ends: Ends) -> None:
    client, server = ends.pair()
    ends.proxy.freeze()
    client.sendall(b"question")
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    assert receives_nothing(client)
    assert receives_nothing(server)
    ends.proxy.heal()
    assert read(server, 8) == b"question"
    assert read(client, 6) == b"answer"
    assert client.recv(1) == b""


def test_a_frozen_connection_hides_a_reset(ends: Ends) -> None:
    client, server = ends.pair()
    ends.proxy.freeze()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    assert receives_nothing(client)
    ends.proxy.heal()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_frozen_network_accepts_but_never_answers(ends: Ends) -> None:
    ends.proxy.freeze()
    client = ends.connect()
    client.sendall(b"question")
    assert receives_nothing(client)
    ends.proxy.heal()
    assert read(ends.accept(), 8) == b"question"


def test_a_cut_network_can_be_frozen(ends: Ends) -> None:
    ends.proxy.cut()
    ends.proxy.freeze()
    assert receives_nothing(ends.connect())


def test_only_the_listener_is_frozen(ends: Ends) -> None:
    client, server = ends.listening()
    other, others_server = ends.pair()
    ends.proxy.freeze(only=listener)
    server.sendall(b"news")
    others_server.sendall(b"answer")
    assert read(other, 6) == b"answer"
    assert receives_nothing(client)
    ends.proxy.heal()
    assert read(client, 4) == b"news"


def test_a_new_listener_is_frozen_with_the_others(ends: Ends) -> None:
    ends.proxy.freeze(only=listener)
    client, server = ends.pair()
    client.sendall(b"login")
    assert read(server, 5) == b"login"
    client.sendall(b"LISTEN news")
    assert receives_nothing(server)
    ends.proxy.heal()
    assert read(server, 11) == b"LISTEN news"


def test_only_the_listener_is_cut_and_so_is_each_new_one(ends: Ends) -> None:
    first = ends.listening()
    other, others_server = ends.pair()
    ends.proxy.cut(only=listener)
    second = ends.pair()
    second[0].sendall(b"LISTEN news")
    for end in (*first, *second):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    other.sendall(b"question")
    assert read(others_server, 8) == b"question"


def test_only_the_listener_is_delayed(ends: Ends) -> None:
    client, server = ends.listening()
    other, others_server = ends.pair()
    ends.proxy.delay(HOUR, only=listener)
    server.sendall(b"news")
    others_server.sendall(b"answer")
    assert read(other, 6) == b"answer"
    assert receives_nothing(client)


@pytest.mark.parametrize(
    ("parts", "listens"),
    [
        ([b"Q\0\0\0\x10LISTEN news\0"], True),
        ([b"P\0\0\0\x10LIS", b"TEN news\0"], True),
        ([b"P\0\0\0\x10LISTEN", b" news\0"], True),
        ([b"CLOSE ALL; UNLISTEN *; RESET ALL"], False),
        ([b"CLOSE ALL; UN", b"LISTEN *; RESET ALL"], False),
        ([b"NOTIFY news"], False),
    ],
    ids=["query", "in-two", "before-its-channel", "unlisten", "unlisten-in-two", "notify"],
)
def test_a_listener_is_known_by_its_bytes(ends: Ends, parts: list[bytes], listens: bool) -> None:
    client, server = ends.pair()
    for part in parts:
        client.sendall(part)
        assert read(server, len(part)) == part
    assert [connection.listens for connection in ends.proxy.connections] == [listens]


async def test_only_a_frozen_listener_misses_notifications(postgres: Cluster, database: str) -> None:
    name = database.rpartition("/")[2]
    received: asyncio.Queue[object] = asyncio.Queue()
    with Proxy(postgres.port) as proxy:
        url = postgres.url(name, proxy.port).replace("+asyncpg", "")
        listening, other = await asyncpg.connect(url), await asyncpg.connect(url)
        await listening.add_listener("news", lambda *arguments: received.put_nowait(arguments[3]))
        await other.add_listener("other", lambda *arguments: None)
        port = await other.fetchval("SELECT client_port FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        assert {connection.server_port == port for connection in proxy.connections} == {True, False}
        proxy.freeze(only=lambda connection: listener(connection) and connection.server_port != port)
        await other.execute("NOTIFY news, 'frozen'")
        assert await other.fetchval("SELECT 1") == 1
        assert received.empty()
        proxy.heal()
        assert await received.get() == "frozen"
        proxy.cut(every)
        assert [await _is_broken(connection) for connection in (listening, other)] == [True, True]


async def _is_broken(connection: asyncpg.Connection) -> bool:
    try:
        await connection.fetchval("SELECT 1")
    except BROKEN:
        return True
    return False
