"""How many connections are accepted in one turn of the event loop, and that the queue is emptied before a stop."""

import asyncio
import itertools
import os
import resource
import signal
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from uvicorn.server import ServerState

from tests.support.certificates import make_certificate
from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.servers import TOKENAUTH, Server, serve, spawn, worker, write_config
from tokenauth.server.acceptor import OPEN_PER_ACCEPT, Acceptor
from tokenauth.server.listener import stop_handshakes

WAITING = 100
"""The number of connections in the queue of a listening socket."""


@contextmanager
def queue() -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """Open a listening socket whose queue holds connections."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2 * WAITING))
        listener.settimeout(20)
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname(), timeout=20)) for _ in range(WAITING)
        ]
        yield listener, clients


class Greeter(asyncio.Protocol):
    """Send a greeting to each client and close."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(b"hello")
        transport.close()


def accept(listener: socket.socket, busy: int = 0) -> tuple[Acceptor, list[Greeter]]:
    """Return an acceptor for a server that already has `busy` connections, and the connections that it accepts."""
    greeters: list[Greeter] = []

    def greet(_: ServerState) -> Any:
        greeters.append(Greeter())
        return greeters[-1]

    state = ServerState()
    state.connections = cast(Any, set(range(busy)))
    return Acceptor(listener, greet, state), greeters


@pytest.mark.parametrize("busy", [0, 80, 400])
def test_busy_connections_do_not_slow_accepting(busy: int) -> None:
    """With more open connections a turn of the event loop takes longer, so more are accepted in each turn."""

    async def run() -> list[int]:
        acceptor, accepted = accept(listener, busy)
        turns = [0]
        async with asyncio.timeout(20):
            while turns[-1] < WAITING:
                await asyncio.sleep(0)
                turns.append(len(accepted))
        await acceptor.drain(0)
        await asyncio.sleep(0)  # the connections close
        return turns

    with queue() as (listener, _):
        turns = asyncio.run(run())
    assert max(b - a for a, b in itertools.pairwise(turns)) == min(WAITING, 1 + busy // OPEN_PER_ACCEPT)


def test_the_queue_is_accepted_before_the_socket_closes() -> None:
    async def run() -> None:
        acceptor, _ = accept(listener.dup())
        await acceptor.drain(0)
        await asyncio.sleep(0)  # the connections close

    with queue() as (listener, clients):
        asyncio.run(run())
        assert {client.recv(100) for client in clients} == {b"hello"}


def test_no_connection_enters_a_queue_about_to_close() -> None:
    """The TCP stack of a late client retries after a second. It is not reset after it has sent its request."""
    with queue() as (listener, clients):
        stop_handshakes(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.3)
        for client in clients:
            client.sendall(b"request")
            with listener.accept()[0] as accepted:
                assert accepted.recv(100) == b"request"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_queued_connections_are_answered_at_sigterm(tmp_path: Path) -> None:
    """SIGSTOP holds the worker while clients connect and send, so that all of them wait in the queue."""
    with worker(write_config(tmp_path)) as server, waiting(server, [server.process.pid]) as clients:
        server.process.send_signal(signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGCONT)
        assert answers(clients) == [200] * WAITING


@pytest.mark.extended
def test_no_worker_drops_the_queue_at_sigterm(tmp_path: Path) -> None:
    """Each worker and the main process hold the socket, and the last to close it must have emptied the queue."""
    with two_workers(tmp_path) as (server, workers), waiting(server, workers) as clients:
        server.process.send_signal(signal.SIGTERM)
        server.wait("stopping")
        for process in workers:
            os.kill(process, signal.SIGCONT)
        assert answers(clients) == [200] * WAITING
        assert server.process.wait(30) == 0


@pytest.mark.faults
def test_a_reload_loses_no_queued_connection(tmp_path: Path) -> None:
    with two_workers(tmp_path) as (server, workers), waiting(server, workers) as clients:
        server.process.send_signal(signal.SIGHUP)
        assert answers(clients) == [200] * WAITING, "the new workers answer: the old ones are still held by SIGSTOP"
        for process in workers:
            os.kill(process, signal.SIGCONT)
        server.wait("reloaded")
        assert server.stop() == 0


@contextmanager
def two_workers(directory: Path) -> Iterator[tuple[Server, list[int]]]:
    """Run `tokenauth serve` with a hard limit on descriptors that is above the soft limit."""
    config = write_config(directory)
    command = ["prlimit", "--nofile=256:2048", TOKENAUTH, "serve", "--config", str(config), "--port", "0"]
    with spawn([*command, "--workers", "2"], directory) as server:
        server.port = server.wait("listening")["port"]
        until(lambda: len(server.events("started")) == 2, "both workers have started")
        main = server.process.pid
        workers = [int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
        assert len(workers) == 2
        for process in workers:
            assert resource.prlimit(process, resource.RLIMIT_NOFILE) == (2048, 2048), (
                "the worker has raised its soft limit"
            )
        yield server, workers


@contextmanager
def waiting(server: Server, processes: list[int]) -> Iterator[list[socket.socket]]:
    """Connect clients and send requests while all processes that could accept them are held by SIGSTOP."""
    with ExitStack() as stack:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        address = ("127.0.0.1", server.port)
        clients = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(WAITING)]
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        yield clients


def answers(clients: list[socket.socket]) -> list[int]:
    """Read the status of each client's response; 0 if there is none."""
    return [int(client.recv(65536)[9:12] or 0) for client in clients]


def send_plainly(client: socket.socket, request: bytes, process: int) -> None:
    """Send a request to a worker that is held by SIGSTOP."""
    os.kill(process, signal.SIGSTOP)
    client.sendall(request)


def send_over_tls(client: socket.socket, request: bytes, process: int) -> None:
    """Send a request together with the end of the handshake, to a worker that is held by SIGSTOP."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secure = context.wrap_bio(incoming, outgoing)
    ended = False
    while not ended:
        try:
            secure.do_handshake()
            ended = True
        except ssl.SSLWantReadError:
            client.sendall(outgoing.read())
            incoming.write(client.recv(65536))
    secure.write(request)
    send_plainly(client, outgoing.read(), process)


@pytest.mark.parametrize("send", [send_plainly, send_over_tls])
def test_a_client_that_resets_at_once_has_an_address(
    tmp_path: Path, send: Callable[[socket.socket, bytes, int], None]
) -> None:
    """The kernel no longer knows it when the request is read. So a proxy that resets counts as trusted, too."""
    tables = '[server]\naccess_log = true\nworkers = 1\ntrusted_proxies = ["127.0.0.2"]\n'
    if send is send_over_tls:
        tables += make_certificate(tmp_path).settings()
    with serve(write_config(tmp_path, tables)) as server:
        (process,) = workers_of(server)
        for address, expected in {"127.0.0.1": "127.0.0.1", "127.0.0.2": "203.0.113.7"}.items():
            with socket.create_connection(("127.0.0.1", server.port), 30, (address, 0)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                send(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n", process)
            os.kill(process, signal.SIGCONT)
            server.wait("request", client=expected)
