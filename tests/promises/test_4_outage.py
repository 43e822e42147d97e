"""Promise 4: a broken store is 503 with Retry-After, never "invalid"."""

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from tests.support.connections import LOGIN, Answer, Connection, takes_connections
from tests.support.journal import locked, until, workers
from tests.support.ports import free_port
from tests.support.servers import TOKENAUTH, spawn, worker, write_config
from tests.system.test_cli import run
from tokenauth.service import create_service
from tokenauth.settings import loader

PERMITS = "[pools.permits]\ncapacity = {}\nprefill = true"


def is_outage(answer: Answer) -> bool:
    """Whether this is the answer to an outage of the store, in the form that promise 4 states."""
    if answer.status != 503:
        return False
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"] == "store_unavailable"
    return True


@pytest.mark.faults  # takes as long as a writer waits for the lock
def test_a_locked_store_refuses_no_valid_token(tmp_path: Path) -> None:
    """Validation continues, a login waits and gets 503, and a log-out is queued and written later."""
    config = write_config(tmp_path)
    with (
        workers(config, None, 2) as servers,
        Connection(servers[0].port) as here,
        Connection(servers[1].port) as there,
        ThreadPoolExecutor(2) as others,
    ):
        kept, ended = here.log_in(), here.log_in()
        with locked(tmp_path / "tokenauth.db"), Connection(servers[0].port) as one, Connection(servers[1].port) as two:
            login = others.submit(one.ask, "POST", "/api/token", LOGIN)
            logout = others.submit(two.ask, "DELETE", "/api/token", {"token": ended})
            answers = 0
            while not (login.done() and logout.done()):
                assert here.valid(kept)
                assert there.valid(kept)
                answers += 1
            assert is_outage(login.result())
            assert logout.result().status == 200
            assert logout.result().json() == {"valid": False, "expiry_time": None}
            assert not there.valid(ended)
            assert answers > 3, "validation waits for the writer"
            [event] = servers[0].events("store_not_writable")
            assert event["reason"].startswith("database is locked. Another program holds a lock on ")
            assert "`fuser -v " in event["reason"]
            assert event["reason"] in here.ask("GET", "/readyz").json()["reason"]
        assert servers[1].events("revocation_held_in_memory")
        until(lambda: not here.valid(ended), "the other worker refuses the token that was revoked during the outage")
        assert not there.valid(ended)
        assert here.valid(kept)
        assert there.valid(here.log_in())


def test_a_full_disk_refuses_no_token_and_keeps_revocations(tmp_path: Path) -> None:
    """A limit on the size of files simulates the full disk. The log file is smaller than the limit."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    with worker(config) as server, Connection(server.port) as connection:
        tokens = [connection.log_in() for _ in range(50)]
        room = (tmp_path / "tokenauth.db-wal").stat().st_size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        for _ in range(5000):
            answer = connection.ask("POST", "/api/token", LOGIN)
            if answer.status != 200:
                break
            tokens.append(answer.json()["token"])
        assert is_outage(answer)
        connection.log_out(tokens[0])
        assert not connection.valid(tokens[0])
        assert all(connection.valid(token) for token in tokens[1:])
        assert is_outage(connection.ask("DELETE", "/api/tokens", X_Token=tokens[1]))
        assert server.events("revocation_held_in_memory")
        assert server.events("store_not_writable")

        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: bool(server.events("token_revoked")), "the revocation is written once there is room")
        server.kill()
    with worker(config) as server, Connection(server.port) as connection:
        assert not connection.valid(tokens[0])
        assert all(connection.valid(token) for token in tokens[1:])


def test_readyz_fails_while_the_store_cannot_be_written(tmp_path: Path) -> None:
    """It gives the reason, and succeeds again when the store can be written again."""
    with worker(write_config(tmp_path)) as server, Connection(server.port) as connection:
        connection.log_in()
        room = (tmp_path / "tokenauth.db-wal").stat().st_size
        assert connection.ask("GET", "/readyz").status == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        for _ in range(5000):
            if is_outage(connection.ask("POST", "/api/token", LOGIN)):
                break
        answer = connection.ask("GET", "/readyz")
        assert (answer.status, answer.json()["status"]) == (503, "not ready")
        assert answer.json()["reason"]
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: connection.ask("GET", "/readyz").status == 200, "ready again without a write")
        connection.log_in()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_disk_with_room_for_a_probe_only_is_full(tmp_path: Path, rows: int) -> None:
    """A probe's row fits but a login does not: the worker stays not ready, and logs no recovery."""
    with worker(write_config(tmp_path)) as server, Connection(server.port) as connection:
        connection.log_in()
        room = (tmp_path / "tokenauth.db-wal").stat().st_size + rows * 2200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        until(lambda: is_outage(connection.ask("POST", "/api/token", LOGIN)), "the room is used up")
        until(lambda: connection.ask("GET", "/readyz").status == 503, "the worker is not ready")
        for _ in range(20):
            assert is_outage(connection.ask("POST", "/api/token", LOGIN))
            assert connection.ask("GET", "/readyz").status == 503
        until(lambda: len(server.events("login_refused")) > 20, "each refused login is logged")
        assert len(server.events("store_not_writable")) == 1
        assert not server.events("store_writable_again")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: connection.ask("GET", "/readyz").status == 200, "there is room again")
        connection.log_in()


def test_a_worker_serves_although_its_pool_is_not_filled(tmp_path: Path) -> None:
    """It leases nothing from the pool, since a lease is a write."""
    config = write_config(tmp_path, PERMITS.format(1))
    database = tmp_path / "tokenauth.db"
    with worker(config) as first, Connection(first.port) as here, closing(sqlite3.connect(database)) as reader:
        _checkpoint(database)
        reader.execute("BEGIN")  # keeps SQLite from restarting the write-ahead log, which would free space
        reader.execute("SELECT count(*) FROM tokens").fetchone()
        token = here.log_in()
        write_config(tmp_path, PERMITS.format(50))
        room = (tmp_path / "tokenauth.db-wal").stat().st_size
        command = ["prlimit", f"--fsize={room}", sys.executable, "-m", "tests.support.worker", str(config), "-"]
        with spawn(command, tmp_path) as second:
            second.port = second.wait("test_worker_ready")["port"]
            assert {event["pool"] for event in second.events("pool_not_filled")} == {"permits"}
            with Connection(second.port) as there:
                assert there.valid(token)
                assert is_outage(there.ask("POST", "/api/pools/permits/leases", X_Token=token))
        assert here.ask("POST", "/api/pools/permits/leases", X_Token=token).status == 201


def _delete(database: Path) -> None:
    for name in ("", "-wal", "-shm"):
        database.with_name(database.name + name).unlink(missing_ok=True)


def _replace(database: Path) -> None:
    with sqlite3.connect(database) as db, sqlite3.connect(database.with_name("other.db")) as other:
        db.backup(other)
        other.execute("DELETE FROM tokens")
    db.close()
    other.close()
    os.replace(database.with_name("other.db"), database)


def _checkpoint(database: Path) -> None:
    with sqlite3.connect(database) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    db.close()


def _truncate(database: Path) -> None:
    _checkpoint(database)
    os.truncate(database, 0)


def _truncate_before_a_checkpoint(database: Path) -> None:
    os.truncate(database, 0)


def _overwrite(database: Path) -> None:
    _checkpoint(database)
    with database.open("r+b") as file:
        file.write(b"garbage!" * (database.stat().st_size // 8))


def _delete_log(database: Path) -> None:
    os.unlink(f"{database}-wal")


def _delete_index(database: Path) -> None:
    os.unlink(f"{database}-shm")


@pytest.mark.parametrize(
    "harm",
    [
        _delete,
        pytest.param(_delete_log, marks=pytest.mark.faults),
        pytest.param(_delete_index, marks=pytest.mark.faults),
        pytest.param(_replace, marks=pytest.mark.faults),
        _truncate_before_a_checkpoint,
        pytest.param(_truncate, marks=pytest.mark.faults),
        pytest.param(_overwrite, marks=pytest.mark.faults),
    ],
)
def test_a_damaged_store_is_503_for_every_token(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """The worker checks the files every second. Until it notices, answers may be correct, but never wrong."""
    with worker(write_config(tmp_path)) as server, Connection(server.port) as connection:
        tokens = [connection.log_in() for _ in range(50)]
        assert connection.valid(tokens[0])
        assert connection.ask("GET", "/readyz").status == 200
        harm(tmp_path / "tokenauth.db")

        def down() -> bool:
            answers = [connection.ask("GET", f"/api/token?token={token}") for token in tokens[:10]]
            assert all(is_outage(answer) or answer.json()["valid"] is True for answer in answers), answers
            answers.append(connection.ask("GET", "/api/me", X_Token=tokens[1]))
            assert is_outage(answers[-1]) or answers[-1].status == 200
            answers.append(connection.ask("POST", "/api/token", LOGIN))
            assert is_outage(answers[-1]) or answers[-1].status == 200
            return all(map(is_outage, answers))

        until(down, "every answer is 503")
        for path in ("/api/me", "/api/tokens"):
            assert is_outage(connection.ask("GET", path, X_Token=tokens[1]))
        assert is_outage(connection.ask("DELETE", "/api/tokens", X_Token=tokens[1]))
        connection.log_out(tokens[2])
        assert server.events("revocation_held_in_memory")
        assert is_outage(connection.ask("GET", f"/api/token?token={tokens[2]}")), "must be neither valid nor invalid"
        ready = connection.ask("GET", "/readyz")
        assert (ready.status, ready.json()["status"]) == (503, "not ready")
        assert ready.json()["reason"]
        assert connection.ask("GET", "/healthz").status == 200
        assert server.process.poll() is None


def test_a_start_leaves_a_foreign_file_unchanged(tmp_path: Path) -> None:
    """It prints one clear line, and does not replace the file by an empty database."""
    write_config(tmp_path)
    (tmp_path / "tokenauth.db").write_bytes(b"garbage!" * 1024)
    done = run(tmp_path, "serve", "--port", "0")
    assert done.returncode not in {0, -6, -9, -11}
    assert "tokenauth.db cannot be used" in done.stderr
    assert "startup failed" not in done.stderr, "uvicorn's line says nothing"
    assert "Traceback" not in done.stderr
    assert (tmp_path / "tokenauth.db").read_bytes() == b"garbage!" * 1024


async def test_a_stop_retries_its_queue_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs each lost revocation. Here the lock is held for longer than the limit."""
    monkeypatch.setattr("tokenauth.revocation_queue._MIN_CLOSE_TIME", 0.05)
    service = create_service(loader.load(write_config(tmp_path)))
    async with service.running():
        service.tokens.revocations.add(bytes(32), "unknown")
        with locked(tmp_path / "tokenauth.db"), structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(20):
                await service.tokens.close()
        service.tokens.revocations.held.clear()
    assert [entry["event"] for entry in logs] == ["revocation_lost"]
    assert logs[0]["id"] == bytes(12).hex()


def test_a_log_that_cannot_be_written_fails_no_request(tmp_path: Path) -> None:
    """The log is often on the same full disk."""
    config = write_config(tmp_path)
    port = free_port()
    command = [TOKENAUTH, "serve", "--config", str(config), "--port", str(port)]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=full, stderr=full)
    try:
        until(lambda: takes_connections(port), "the server answers")
        with Connection(port) as connection:
            token = connection.log_in()
            assert connection.valid(token)
            connection.log_out(token)
            assert not connection.valid(token)
    finally:
        process.terminate()
        process.wait(60)
