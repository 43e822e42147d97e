"""Promise 5: validation never writes, and never waits for a writer."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.connections import LOGIN, Connection
from tests.support.journal import locked, until
from tests.support.servers import HandClock, Server, worker, write_config


@pytest.fixture(scope="module")
def settings() -> str:
    return "[tokens]\nper_user = 0\nidle = 400"


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the modification time of the database's files, without the shared memory in -shm."""
    files = (directory / "tokenauth.db", directory / "tokenauth.db-wal")
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_validation_never_writes(server: Server, directory: Path) -> None:
    """Neither for valid nor for unknown tokens, cached or not."""
    with Connection(server.port) as connection:
        tokens = [connection.log_in() for _ in range(20)]
        connection.log_out(tokens.pop())
        before = content(directory)
        for token in tokens * 10:
            assert connection.valid(token)
            assert not connection.valid(token[::-1])
            assert connection.ask("GET", "/api/me", X_Token=token).status == 200
            assert connection.ask("GET", "/api/me", X_Token=token[::-1]).status == 401
        assert connection.ask("GET", "/readyz").status == 200
        assert content(directory) == before


def test_uses_are_written_later_by_no_request(server: Server, directory: Path, clock: HandClock) -> None:
    """Uses that extend tokens are answered while the store is locked, and written when it is not."""
    with Connection(server.port) as connection:
        tokens = [connection.log_in() for _ in range(20)]
        end = int(clock()) + 500
        clock.set(end - 1)  # so short before the end, uses are written as soon as possible
        with locked(directory / "tokenauth.db"):
            before = content(directory)
            for token in tokens * 3:
                assert connection.valid(token)
                assert connection.ask("GET", "/api/me", X_Token=token).status == 200
                assert connection.ask("GET", "/auth", X_Token=token).status == 200
            assert content(directory) == before
            clock.set(end + 1)
            assert all(connection.valid(token) for token in tokens)
        until(lambda: latest_use(directory) == end - 1, "the uses are written")
        assert all(connection.valid(token) for token in tokens)


def latest_use(directory: Path) -> float | None:
    with closing(sqlite3.connect(directory / "tokenauth.db")) as db:
        found: float | None = db.execute("SELECT min(used_at) FROM tokens").fetchone()[0]
    return found


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_validation_never_waits_for_a_writer(server: Server, directory: Path, lock: str) -> None:
    """Another process holds the write lock, and a login in this worker waits for it."""
    with Connection(server.port) as connection, Connection(server.port) as waiting, ThreadPoolExecutor(1) as other:
        tokens = [connection.log_in() for _ in range(50)]
        assert connection.valid(tokens[0])
        with locked(directory / "tokenauth.db", lock):
            login = other.submit(waiting.ask, "POST", "/api/token", LOGIN)
            for token in tokens:
                assert connection.valid(token)
                assert connection.ask("GET", "/api/me", X_Token=token).status == 200
                assert not connection.valid(token[::-1])
            assert not login.done(), "the login must still wait for the lock"
        assert login.result().status == 200, "the login must succeed once the lock is free"


def test_a_long_read_by_others_does_not_block_a_worker(tmp_path: Path) -> None:
    """A backup that keeps a snapshot open blocks neither logins nor probes."""
    with worker(write_config(tmp_path)) as server, Connection(server.port) as connection:
        first = connection.log_in()
        with locked(tmp_path / "tokenauth.db", "DEFERRED") as backup:
            assert backup.execute("SELECT count(*) FROM tokens").fetchone() == (1,)
            later = connection.log_in()
            connection.log_out(first)
            until(lambda: connection.valid(later) and not connection.valid(first), "the worker sees its own writes")
            assert backup.execute("SELECT count(*) FROM tokens").fetchone() == (1,)
