"""Promise 3, for users: SIGHUP to `tokenauth serve` ends the tokens of removed users, and refuses no request."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import Closed, Connection
from tests.support.journal import background, serving, until
from tests.support.main_process import workers_of
from tests.support.servers import USERS, Server, write_config

# "new-secret" at the lowest cost
NEW_HASH = "$argon2id$v=19$m=8,t=1,p=1$wGUxeHZ3w8d0lR7hClnfsA$VurG/lrlBjogxg+ODKprhNbfa2EsqFDYIF2zU+ELTbQ"


def reload(server: Server, workers: int) -> None:
    """Send SIGHUP and wait until each worker has been replaced."""
    until(lambda: len(server.events("started")) >= workers, "every worker serves")
    before = len(server.events("stopped"))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(server.events("stopped")) == before + workers, f"{workers} workers replaced")


def test_sighup_ends_tokens_of_removed_and_changed_users(tmp_path: Path) -> None:
    """Meanwhile every request is answered, over open connections and over new ones."""
    pool = "[pools.p]\ncapacity = 9\nprefill = true\n"
    config = write_config(tmp_path, pool)
    with ExitStack() as stack, serving(config, "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        with Connection(server.port) as connection:
            admin = connection.log_in()
            ann = connection.log_in("ann", "ann-secret")
            bob = connection.log_in("bob", "bob-secret")
        slow = {token: stack.enter_context(half_a_lease(server, token)) for token in (admin, ann, bob)}
        kept = stack.enter_context(Connection(server.port))

        def probe_over_an_open_connection() -> None:
            nonlocal kept
            try:
                assert kept.valid(admin)
            except Closed:  # before anything was sent: no request was lost
                kept = stack.enter_context(Connection(server.port))

        def probe_over_a_new_connection() -> None:
            with Connection(server.port) as connection:
                assert connection.ask("GET", f"/api/token?token={admin}", Connection="close").json()["valid"]

        without_bob = USERS[: USERS.rindex("[[users]]")]
        start = without_bob.index("$argon2id", without_bob.index('"ann"'))
        new = without_bob[:start] + NEW_HASH + without_bob[without_bob.index('"', start) :]
        write_config(tmp_path, pool, users=new)
        with background(probe_over_an_open_connection), background(probe_over_a_new_connection):
            server.process.send_signal(signal.SIGHUP)
            until(lambda: not any(valid_somewhere(server, token) for token in (ann, bob)), "both are refused")
            until(lambda: len(server.events("reloaded")) == 1, "the new workers serve")
        # Slow requests must be waited for. One worker may have got none of them.
        assert len(server.events("stopped")) < 2
        for token, code in [(admin, b"201"), (ann, b"401"), (bob, b"401")]:
            slow[token].sendall(b"}")
            assert slow[token].recv(65536)[9:12] == code
        until(lambda: len(server.events("stopped")) == 2, "the old workers ended")
        for _ in range(10):  # either worker may answer
            with Connection(server.port) as connection:
                assert connection.valid(admin)
                assert not connection.valid(ann)
                assert not connection.valid(bob)
                assert connection.ask("GET", "/api/me", X_Token=bob).status == 401
        with Connection(server.port) as connection:
            for name, password, status in [
                ("ann", "ann-secret", 401),
                ("ann", "new-secret", 200),
                ("bob", "bob-secret", 401),
            ]:
                login = {"username": name, "password": password}
                assert connection.ask("POST", "/api/token", login).status == status


@contextmanager
def half_a_lease(server: Server, token: str) -> Iterator[socket.socket]:
    """Send half of a request whose token is valid, and yield the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        head = f"POST /api/pools/p/leases HTTP/1.1\r\nHost: x\r\nX-Token: {token}\r\nContent-Length: 2\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n{{".encode())
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        yield connection


def valid_somewhere(server: Server, token: str) -> bool:
    """Whether any worker that accepts connections accepts the token."""
    for _ in range(4):
        with Connection(server.port) as connection:
            if connection.ask("GET", f"/api/token?token={token}", Connection="close").json()["valid"]:
                return True
    return False


@pytest.fixture(scope="module")
def one_worker(directory: Path) -> Iterator[Server]:
    """Serve with one worker. Every test leaves its users unchanged."""
    with serving(write_config(directory)) as server:
        yield server


@pytest.mark.parametrize(
    ("tables", "users", "why"),
    [
        ('[tokens]\nttl = "soon"\n', USERS, "tokens.ttl"),
        ("", USERS.replace("$argon2id$v=19$m=8", "$argon2id$v=19$m=0"), "is not a hash that"),
        ('[database]\nurl = "sqlite+aiosqlite:////nowhere/t.db"', USERS, "nowhere"),
    ],
    ids=["unreadable", "refused", "cannot start"],
)
def test_a_reload_that_fails_changes_nothing_and_is_logged(
    one_worker: Server, directory: Path, tables: str, users: str, why: str
) -> None:
    with Connection(one_worker.port) as connection:
        token = connection.log_in()
    users = users.replace('"bob"', '"eve"')
    if "[database]" in tables:
        (directory / "config.toml").write_text(tables + users)
    else:
        write_config(directory, tables, users=users)
    before = len(failures(one_worker))
    one_worker.process.send_signal(signal.SIGHUP)
    until(lambda: len(failures(one_worker)) > before, "the failure is logged")
    assert why in failures(one_worker)[before]["detail"]
    with Connection(one_worker.port) as connection:
        assert connection.valid(token)
        until(lambda: can_log_in(one_worker, "bob"), "the old users can log in")
    assert one_worker.events("reloaded") == []
    assert len(one_worker.events("started")) == 1


def test_a_replaced_worker_ignores_unloaded_edits(one_worker: Server, directory: Path) -> None:
    good = write_config(directory).read_text()
    broken = good.replace('"bob"', '"eve"').replace("[database]", "[tokens]\nttl = 'soon'\n[database]")
    (directory / "config.toml").write_text(broken)
    os.kill(workers_of(one_worker)[0], signal.SIGKILL)
    until(lambda: len(one_worker.events("started")) == 2, "the worker was replaced")
    (death,) = one_worker.events("worker_replaced")
    assert (death["exit_code"], death["reason"]) == (-signal.SIGKILL, "ended by SIGKILL")
    with Connection(one_worker.port) as connection:
        assert connection.valid(connection.log_in("bob", "bob-secret"))


def failures(server: Server) -> list[dict[str, Any]]:
    """Return the log events of failed reloads."""
    return server.events("reload_refused")


def can_log_in(server: Server, username: str) -> bool:
    with Connection(server.port) as connection:
        login = {"username": username, "password": f"{username}-secret"}
        return connection.ask("POST", "/api/token", login).status == 200
