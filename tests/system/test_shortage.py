"""Without threads, memory or file descriptors a request gets 503 with the reason. Service resumes at once after it."""

import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tests.support.connections import LOGIN, Connection
from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.servers import Server, spawn, worker, write_config
from tests.wire.test_tls import ask, connect, secured, trusting

pytestmark = pytest.mark.extended

READY = (200, {"status": "ready"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a new worker."""
    with worker(write_config(tmp_path)) as running:
        yield running


@pytest.fixture
def worker_without_spare_stacks(tmp_path: Path) -> Iterator[Server]:
    """Run a new worker, whose password thread has not started. Each thread that it starts needs memory.

    Otherwise glibc keeps the stacks of threads that have ended for later ones, and a forked worker inherits some.
    """
    command = [sys.executable, "-m", "tests.support.worker", str(write_config(tmp_path)), "-"]
    with spawn(command, tmp_path, {"GLIBC_TUNABLES": "glibc.pthread.stack_cache_size=0"}) as running:
        running.port = running.wait("test_worker_ready")["port"]
        yield running


def readiness(connection: Connection) -> tuple[int, object]:
    """Return the answer of /readyz. The worker must be alive in any case."""
    assert connection.ask("GET", "/healthz").status == 200
    answer = connection.ask("GET", "/readyz")
    return answer.status, answer.json()


@contextmanager
def no_room_for_threads(process: int) -> Iterator[None]:
    """Leave a process some memory, but not enough for the stack of another thread."""
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(r"VmSize:\s+(\d+) kB", status)
    assert match is not None
    before = resource.prlimit(process, resource.RLIMIT_AS)
    resource.prlimit(process, resource.RLIMIT_AS, (int(match[1]) * 1024 + (4 << 20), before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_AS, before)


def test_a_login_without_a_thread_is_503_until_one_starts(worker_without_spare_stacks: Server) -> None:
    server = worker_without_spare_stacks
    with Connection(server.port) as connection:
        assert readiness(connection) == READY
        with no_room_for_threads(server.process.pid):
            for _ in range(100):  # more than the queue holds: a failed login must leave it
                answer = connection.ask("POST", "/api/token", LOGIN)
                assert (answer.status, answer.headers.get("retry-after")) == (503, "1"), answer
            reason = "passwords cannot be verified: a thread cannot be started"
            assert readiness(connection) == (503, {"reason": reason, "status": "not ready"})
        assert readiness(connection) == READY, "must recover without a login"
        assert connection.valid(connection.log_in())
    assert len(server.events("thread_not_started")) == len(server.events("thread_started_again")) == 1
    assert not server.events("unexpected_error")


def test_a_list_that_needs_a_thread_is_503_until_one_starts(worker_without_spare_stacks: Server) -> None:
    """Lists are read by threads that start when they are needed."""
    server = worker_without_spare_stacks
    with Connection(server.port) as connection:
        token = connection.log_in()
        with no_room_for_threads(server.process.pid):
            answer = connection.ask("GET", "/api/tokens", X_Token=token)
            assert (answer.status, answer.json()["error"]) == (503, "store_unavailable")
            assert readiness(connection) == (
                503,
                {
                    "reason": "store unreachable: The server cannot start a thread. Try again shortly.",
                    "status": "not ready",
                },
            )
            assert connection.valid(token)
        assert readiness(connection) == READY
        assert connection.ask("GET", "/api/tokens", X_Token=token).status == 200
    assert not server.events("unexpected_error")


@contextmanager
def descriptors_limited(process: int, soft: int) -> Iterator[None]:
    """Limit the open descriptors of a process."""
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)


def new_connection_is_kept(server: Server) -> bool:
    """Whether a new connection stays open after its first answer. It must be answered in any case."""
    with Connection(server.port) as connection:
        answer = connection.ask("GET", "/healthz")
        assert answer.status == 200
        return answer.headers.get("connection") != "close"


def test_without_descriptors_a_connection_gets_one_answer(server: Server) -> None:
    with ExitStack() as stack, descriptors_limited(server.process.pid, 96):
        kept, ended = [], []
        for _ in range(64):
            kept.append(stack.enter_context(Connection(server.port)))
            ended.append(kept[-1].ask("GET", "/healthz").headers.get("connection") == "close")
        assert ended == sorted(ended), "must keep the first connections open"
        assert 20 < ended.index(True) < 64, "must reserve a quarter of all descriptors"
        first = kept[0]
        assert readiness(first) == (503, {"reason": "out of file descriptors: 96 are allowed", "status": "not ready"})
        token = first.log_in()
        assert first.ask("GET", "/api/tokens", X_Token=token).status == 200, "must still be able to open the database"
        for _ in range(50):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            idle.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert not new_connection_is_kept(server), "must answer despite 50 connections with half a head"
        for more in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\na"):
            for _ in range(50):
                stuck = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                stuck.sendall(b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + more)
            assert not new_connection_is_kept(server), "must answer despite 50 incomplete bodies"
        for one in kept[1:]:
            one.close()
        until(lambda: new_connection_is_kept(server), "a new connection is kept again")
        assert readiness(first) == READY
    assert len(server.events("file_descriptors_short")) == len(server.events("file_descriptors_free_again")) == 1


def test_without_descriptors_handshakes_hold_up_nobody(tmp_path: Path) -> None:
    """Neither those that fail, nor those that never end."""
    made = make_certificate(tmp_path)
    with secured(tmp_path, made) as server:
        (worker,) = workers_of(server)
        context = trusting(made.certificate)
        with ExitStack() as stack, descriptors_limited(worker, 96):
            kept = [stack.enter_context(connect(server, context)) for _ in range(64)]
            assert [ask(one) for one in kept[:5]] == [200] * 5
            server.wait("file_descriptors_short")
            for _ in range(60):
                with socket.create_connection(("127.0.0.1", server.port), 30) as other:
                    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    with suppress(ConnectionResetError):
                        assert other.recv(100) == b""
            with connect(server, context) as connection:
                assert ask(connection) == 200, "must answer after 60 failed handshakes"
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            with connect(server, context) as connection:
                assert ask(connection) == 200, "must answer beside 60 stalled handshakes"
        assert server.stop() == 0
        assert {event["event"] for event in server.errors()} == {"file_descriptors_short"}


def open_descriptors(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def test_clients_ended_in_a_shortage_hold_up_no_stop(server: Server) -> None:
    """They wait in the queue, so that each has just been accepted when it is ended for the next one."""
    process = server.process.pid
    with ExitStack() as stack, descriptors_limited(process, open_descriptors(process) + 6):
        os.kill(process, signal.SIGSTOP)
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        os.kill(process, signal.SIGCONT)
        with Connection(server.port) as last:
            assert last.ask("GET", "/healthz").status == 200
        assert server.events("file_descriptors_short")
    assert server.stop() == -signal.SIGTERM, "it waits for no connection that is gone"


def test_clients_that_leave_bodies_unsent_take_no_reserve(server: Server) -> None:
    """Each is answered before the end of its body, so its connection stays open for a while to send the rest."""
    process = server.process.pid
    with ExitStack() as stack, descriptors_limited(process, 96):
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        server.wait("file_descriptors_short")
        for _ in range(60):
            stuck = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            stuck.sendall(b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n{")
            assert stuck.recv(65536).startswith(b"HTTP/1.1 413 ")
            assert open_descriptors(process) < 96 - 12, "more than half of the reserve of 24"


def test_without_descriptors_open_connections_work(server: Server) -> None:
    with Connection(server.port) as kept:
        token = kept.log_in()
        with descriptors_limited(server.process.pid, 10):
            waiting = Connection(server.port)
            server.wait("file_descriptors_short")
            reason = "out of file descriptors: Too many open files"
            assert readiness(kept) == (503, {"reason": reason, "status": "not ready"})
            assert kept.valid(token)
            kept.log_out(token)
        assert readiness(kept) == READY
        with waiting:
            assert waiting.ask("GET", "/healthz").status == 200, "must not be dropped, as libuv would do"
        server.wait("file_descriptors_free_again")
    assert len(server.events("file_descriptors_short")) == 1, "must log the shortage once"


def peak_memory(process: int) -> int:
    """Return the largest resident memory that a process has had, in KiB."""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0])


def test_requests_after_the_last_answer_take_no_memory(server: Server) -> None:
    """The connection ends after the first of many requests that came at once. Those that follow are not kept."""
    process, request = server.process.pid, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack, descriptors_limited(process, open_descriptors(process) + 6):
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        client.sendall(request * 100)
        before = peak_memory(process)
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                client.send(request * 5000)
        assert peak_memory(process) - before < 16 * 1024
