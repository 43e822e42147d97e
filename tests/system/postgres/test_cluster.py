"""The PostgreSQL servers of tests/support/postgres.py work, and end with the tests."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.support.postgres import Cluster, cluster
from tests.support.postgres_programs import programs
from tests.support.servers import ROOT
from tests.system.postgres.nodes import connected

BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
"""What asyncpg raises when its connection was lost, depending on the timing."""

# Starts a cluster, prints its directory and port, and waits to be killed.
_VICTIM = """
import sys
from tests.support.postgres import cluster
with cluster(fsync=False) as running:
    print(running.directory, running.port, flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def private() -> Iterator[Cluster]:
    """Run a server that tests may stop, with a database and a table that the service may write to."""
    with cluster() as running:
        running.create("kept")
        running.execute("CREATE TABLE notes (text text)", "kept")
        running.execute("GRANT ALL ON notes TO tokenauth", "kept")
        yield running


def databases(running: Cluster) -> set[str]:
    return {name for (name,) in running.execute("SELECT datname FROM pg_database")}


async def test_the_service_owns_its_database_and_is_no_superuser(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute("CREATE TABLE mine (text text)")
        assert await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        assert await connection.fetchval("SELECT current_database()") == database.rpartition("/")[2]


async def test_a_database_is_an_independent_copy_of_its_template(postgres: Cluster) -> None:
    async with connected(postgres.create("template")) as connection:
        await connection.execute("CREATE TABLE notes AS SELECT 'first' AS text")
    async with connected(postgres.create("like_it", "template")) as connection:
        assert await connection.fetchval("SELECT text FROM notes") == "first"
        await connection.execute("DELETE FROM notes")
    assert postgres.execute("SELECT text FROM notes", "template") == [("first",)]
    postgres.drop("like_it")
    postgres.drop("template")


async def test_a_database_is_dropped_despite_connections(postgres: Cluster) -> None:
    async with connected(postgres.create("doomed")) as connection:
        assert "doomed" in databases(postgres)
        postgres.drop("doomed")
        assert "doomed" not in databases(postgres)
        with pytest.raises(BROKEN):
            await connection.fetchval("SELECT 1")


async def test_only_connections_of_one_database_are_ended(postgres: Cluster, database: str) -> None:
    url = postgres.create("others")
    async with connected(database) as one, connected(database) as two, connected(url) as other:
        assert postgres.terminate_all(database.rpartition("/")[2]) == 2
        for ended in (one, two):
            with pytest.raises(BROKEN):
                await ended.fetchval("SELECT 1")
        assert await other.fetchval("SELECT 1") == 1
    postgres.drop("others")


async def test_an_immediate_restart_keeps_what_was_committed(private: Cluster) -> None:
    before = private.url("kept")
    async with connected(before) as connection:
        await connection.execute("INSERT INTO notes VALUES ('committed')")
        await connection.execute("BEGIN; INSERT INTO notes VALUES ('not committed')")
        private.restart()
        with pytest.raises(BROKEN):
            await connection.fetchval("SELECT 1")
    assert "automatic recovery in progress" in private.log.read_text()
    assert private.url("kept") == before
    async with connected(before) as connection:
        assert [note["text"] for note in await connection.fetch("SELECT text FROM notes")] == ["committed"]


def test_connections_are_refused_between_stop_and_start(private: Cluster) -> None:
    private.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", private.port))
    private.start()
    assert private.execute("SELECT 1") == [(1,)]


async def test_a_standby_follows_its_primary_and_is_read_only(private: Cluster) -> None:
    with private.standby() as standby:
        private.execute("CREATE TABLE followed AS SELECT 1 AS number", "kept")
        standby.follow(private)
        async with connected(standby.url("kept")) as connection:
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await connection.execute("INSERT INTO notes VALUES ('never')")
        assert standby.execute("SELECT number FROM followed", "kept") == [(1,)]


def test_only_the_shared_server_runs_without_fsync(postgres: Cluster, private: Cluster) -> None:
    assert [running.execute("SHOW fsync") for running in (postgres, private)] == [[("off",)], [("on",)]]
    assert [running.execute("SHOW synchronous_commit") for running in (postgres, private)] == [[("on",)]] * 2


def test_a_server_ends_when_its_test_run_is_killed() -> None:
    programs()
    command = [sys.executable, "-c", _VICTIM]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        directory, port = victim.stdout.readline().split()
        socket.create_connection(("127.0.0.1", int(port))).close()
        victim.kill()
    deadline = time.monotonic() + 60
    while Path(directory).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


def test_a_closed_server_leaves_nothing() -> None:
    with cluster(fsync=False) as running:
        assert running.directory.exists()
    assert not running.directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port))


def test_programs_run_from_where_only_root_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = programs()
    package = installed.parents[1]
    tmp_path.chmod(0o700)
    for source in (installed.parent, *package.parent.glob(f"{package.name}.libs")):
        shutil.copytree(source, tmp_path / source.relative_to(package.parent), symlinks=True)
    monkeypatch.setenv("TOKENAUTH_TEST_ALL", "1")
    monkeypatch.setenv("TOKENAUTH_POSTGRES", str(tmp_path / installed.relative_to(package.parent)))
    with cluster(fsync=False) as running:
        assert running.execute("SELECT 1") == [(1,)]


@pytest.mark.parametrize(("everything", "raised"), [("0", pytest.skip.Exception), ("1", AssertionError)])
def test_without_programs_a_test_is_skipped_or_fails(
    everything: str, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENAUTH_POSTGRES", str(tmp_path))
    monkeypatch.setenv("TOKENAUTH_TEST_ALL", everything)
    with pytest.raises(raised, match="apt-get install postgresql"):
        programs()
