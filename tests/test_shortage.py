"""What a process lacks (threads, memory, file descriptors) is a 503 that says so, and over as soon as it is there."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.connections import LOGIN, Connection
from tests.servers import Server, worker, write_config

READY = (200, {"status": "ready"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a worker in which nobody has logged in yet."""
    with worker(write_config(tmp_path)) as running:
        yield running


def readiness(connection: Connection) -> tuple[int, object]:
    """Ask whether the worker can serve; it is alive in any case."""
    assert connection.ask("GET", "/healthz").status == 200
    answer = connection.ask("GET", "/readyz")
    return answer.status, answer.json()


@contextmanager
def no_room_for_threads(process: int) -> Iterator[None]:
    """Leave a process some memory to go on with, and not enough for the stack of another thread."""
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(r"VmSize:\s+(\d+) kB", status)
    assert match is not None
    before = resource.prlimit(process, resource.RLIMIT_AS)
    resource.prlimit(process, resource.RLIMIT_AS, (int(match[1]) * 1024 + (4 << 20), before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_AS, before)


def test_a_first_login_without_a_thread_is_503_until_one_starts(server: Server) -> None:
    with Connection(server.port) as connection:
        assert readiness(connection) == READY
        with no_room_for_threads(server.process.pid):
            for _ in range(100):  # more than may wait: none keeps its place
                answer = connection.ask("POST", "/api/token", LOGIN)
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            reason = "passwords cannot be verified: a thread cannot be started"
            assert readiness(connection) == (503, {"reason": reason, "status": "not ready"})
        assert readiness(connection) == READY, "without a login that would show it"
        assert connection.valid(connection.log_in())
    assert len(server.events("thread_not_started")) == len(server.events("thread_started_again")) == 1
    assert not server.events("unexpected")


def test_a_list_that_needs_a_thread_is_503_until_one_starts(server: Server) -> None:
    """The reader of lists has threads of its own, which SQLAlchemy's driver starts."""
    with Connection(server.port) as connection:
        token = connection.log_in()
        with no_room_for_threads(server.process.pid):
            answer = connection.ask("GET", "/api/tokens", X_Token=token)
            assert (answer.status, answer.json()["error"]) == (503, "store_unavailable")
            assert readiness(connection) == (503, {"reason": "store unreachable", "status": "not ready"})
            assert connection.valid(token)
        assert readiness(connection) == READY
        assert connection.ask("GET", "/api/tokens", X_Token=token).status == 200
    assert not server.events("unexpected")
