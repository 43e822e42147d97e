"""Promise 3, while the store cannot be written: all workers refuse a token whose log-out is queued in memory.

Also when the worker that took the log-out is killed or replaced.
"""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.promises.test_10_shutdown import refuses
from tests.support.connections import Connection
from tests.support.journal import locked, serving, until
from tests.support.main_process import workers_of
from tests.support.servers import Server, worker, write_config

TABLES = "[tokens]\nper_user = 0"


@contextmanager
def two_workers(directory: Path) -> Iterator[Server]:
    """Serve with two workers, and wait until both have started."""
    with serving(write_config(directory, TABLES), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        yield server


@contextmanager
def connected(server: Server, pid: int) -> Iterator[Connection]:
    """Connect to one worker. The others are suspended until it has answered."""
    others = [other for other in workers_of(server) if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        connection = Connection(server.port)
        assert connection.ask("GET", "/healthz").status == 200
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)
    with connection:
        yield connection


def accepted_by(server: Server, token: str) -> Sequence[int]:
    found = []
    for pid in workers_of(server):
        with connected(server, pid) as connection:
            if connection.valid(token):
                found.append(pid)
    return found


def fill_the_disk(server: Server, database: Path) -> None:
    """Keep files from growing. The write-ahead log is the longest file."""
    limit_files(server, database.with_name(database.name + "-wal").stat().st_size)


def limit_files(server: Server, size: int) -> None:
    """Limit the size of the files that the server writes."""
    for pid in (server.process.pid, *workers_of(server)):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def hold_a_log_out(server: Server, directory: Path) -> tuple[str, str, int]:
    """Fill the disk and log out at one worker. Return the revoked token, another token and the worker's PID."""
    with Connection(server.port) as connection:
        ended, kept, *_ = [connection.log_in() for _ in range(30)]
    holder, other = workers_of(server)
    with connected(server, holder) as here, connected(server, other) as there:
        assert here.valid(ended)
        assert there.valid(ended)
        fill_the_disk(server, directory / "tokenauth.db")
        here.log_out(ended)
        assert not there.valid(ended), "the answer comes when the other worker knows"
        assert there.valid(kept)
        assert not here.valid(ended)
    until(lambda: len(server.events("revocation_held_in_memory")) == 1, "one worker logs that it holds the revocation")
    return ended, kept, holder


def is_written(config: Path, tokens: Sequence[str]) -> list[bool]:
    """Whether a new server, which knows only the database, refuses each token."""
    with worker(config) as server, Connection(server.port) as connection:
        return [not connection.valid(token) for token in tokens]


def test_a_queued_logout_survives_kill_reload_and_stop(tmp_path: Path) -> None:
    with two_workers(tmp_path) as server:
        ended, kept, holder = hold_a_log_out(server, tmp_path)
        os.kill(holder, signal.SIGKILL)
        until(lambda: len(server.events("started")) == 3, "the worker is replaced")
        assert accepted_by(server, ended) == []
        before = set(workers_of(server))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.events("reloaded") != [], "the new workers serve")
        until(lambda: not before & set(workers_of(server)), "the old workers ended")
        assert server.events("reloaded")[0]["revocations_held"] == 1
        assert accepted_by(server, ended) == []
        assert sorted(accepted_by(server, kept)) == sorted(workers_of(server))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server), "the port is closed")
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        limit_files(server, resource.RLIM_INFINITY)
        assert server.process.wait(60) == 0
        assert server.events("revocation_lost") == []
        (written,) = server.events("token_revoked")
        assert written["late"]
    assert is_written(tmp_path / "config.toml", [ended, kept]) == [True, False]


@pytest.mark.faults  # starts three more processes; tests/unit/test_revocation_queue.py checks the log lines
def test_revocations_never_written_are_logged_once(tmp_path: Path) -> None:
    with two_workers(tmp_path) as server:
        hold_a_log_out(server, tmp_path)
        (held,) = server.events("revocation_held_in_memory")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server), "the port is closed")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
        assert [event["id"] for event in server.events("revocation_lost")] == [held["id"]]


@pytest.mark.faults  # takes as long as the lock
def test_sigterm_under_a_lock_of_six_seconds_loses_nothing(tmp_path: Path) -> None:
    with two_workers(tmp_path) as server, Connection(server.port) as connection:
        ended, kept = connection.log_in(), connection.log_in()
        with locked(tmp_path / "tokenauth.db", "IMMEDIATE"):
            connection.log_out(ended)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(6)
        assert server.process.wait(60) == 0
        assert server.events("revocation_held_in_memory") != []
        assert server.events("revocation_lost") == []
    assert is_written(tmp_path / "config.toml", [ended, kept]) == [True, False]
