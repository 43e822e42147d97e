"""Short versions of tests/system/faults/test_postgres.py: the answers of workers when PostgreSQL fails."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import asyncpg
import pytest

from tests.contract.conftest import token
from tests.support.connections import LOGIN, Connection
from tests.support.history import HandTime
from tests.support.journal import until
from tests.support.patience import be_patient
from tests.support.ports import free_port
from tests.support.postgres import Cluster, cluster
from tests.support.races import POOLS, run_race
from tests.support.servers import START, HandClock, starting, worker
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.crowd import POOL, check_log, is_outage, postgres_config, two_workers
from tests.system.postgres.nodes import connected, nodes
from tests.system.postgres.test_former_primary import two_servers
from tests.system.postgres.test_hosts import several
from tokenauth.errors import StoreUnavailable
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.changes.tokens import REVOCATION_LOCK
from tokenauth.stores.open import examine, open_store
from tokenauth.stores.postgres.engine import PostgresEngine
from tokenauth.stores.postgres.transaction import advisory_key
from tokenauth.stores.store import Store

LEASE_TTL = 30.0
PASSWORD = "correct-horse-battery"

REQUESTS = 900

_HOLD = [
    "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
    " $$BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NULL; END$$",
    *(
        f"CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION hold()"
        for table in ("tokens", "revocations")
    ),
]
"""Makes COMMIT wait for an advisory lock."""


OURS = "FROM pg_stat_activity WHERE datname = '{}' AND application_name = 'tokenauth'"
"""The service's connections to a database."""


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


@contextmanager
def held(postgres: Cluster, url: str, lock: str) -> Iterator[None]:
    """Hold a lock, as another client of the database could."""
    with asyncio.Runner() as runner:
        host, name = str(postgres.directory), name_of(url)
        connection = runner.run(asyncpg.connect(host=host, port=postgres.port, user="postgres", database=name))
        runner.run(connection.execute(f"BEGIN; {lock}"))
        try:
            yield
        finally:
            runner.run(connection.close())


def count(postgres: Cluster, url: str, condition: str) -> int:
    """Count the service's connections that meet a condition."""
    return int(postgres.execute(f"SELECT count(*) {OURS.format(name_of(url))} AND {condition}")[0][0])


def rows(postgres: Cluster, url: str, table: str = "tokens") -> int:
    """Count the rows of a table."""
    return int(postgres.execute(f"SELECT count(*) FROM {table}", name_of(url))[0][0])  # noqa: S608


@pytest.fixture(scope="module")
def locked(postgres: Cluster) -> Iterator[None]:
    """Make PostgreSQL require a password from the role `locked`."""
    file = postgres.directory / "data" / "pg_hba.conf"
    before = file.read_text()
    postgres.execute(f"CREATE ROLE locked LOGIN PASSWORD '{PASSWORD}'")
    file.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{before}")
    postgres.execute("SELECT pg_reload_conf()")
    yield
    file.write_text(before)
    postgres.execute("SELECT pg_reload_conf()")
    postgres.execute("DROP ROLE locked")


STARTS = {
    "refused": ("tokenauth:{password}@127.0.0.1:1/{name}", "Connection refused|Connect call failed"),
    "unknown-host": ("tokenauth:{password}@nowhere.invalid:{port}/{name}", "name resolution|not known"),
    "unknown-database": ("tokenauth:{password}@127.0.0.1:{port}/absent", '"absent" does not exist'),
    "wrong-password": ("locked:{password}-@127.0.0.1:{port}/{name}", "password authentication failed"),
    "no-create": ("locked:{password}@127.0.0.1:{port}/{name}", "permission denied for schema public"),
    "no-host-name": (f"tokenauth:{{password}}@{'a' * 64}.invalid:{{port}}/{{name}}", "cannot be used"),
}


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.usefixtures("locked")
def test_an_unusable_database_is_named_without_its_password(
    postgres: Cluster, database: str, tmp_path: Path, case: str
) -> None:
    address, message = STARTS[case]
    url = address.format(password=PASSWORD, port=postgres.port, name=name_of(database))
    with starting(postgres_config(tmp_path, f"postgresql+asyncpg://{url}")) as server:
        assert server.process.wait(30) not in {None, 0}
        check_log(server)
        assert PASSWORD not in server.log.read_text()
        lines = [str(event["detail"]) for event in server.events() if event["level"] == "error"]
        assert lines[1:] == ["Application startup failed. Exiting."]
        assert re.search(message, lines[0]), lines
        assert "cannot be used: " in lines[0]
        assert not lines[0].rpartition(": ")[2].lstrip("-").isdecimal(), "must not end with a bare error number"


@pytest.mark.faults
async def test_a_start_waits_for_a_server_that_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the server refuses connections, then it answers that it is starting up. A start waits in both cases."""
    monkeypatch.setattr("tokenauth.stores.postgres.engine._START_TIMEOUT", 60.0)
    with cluster() as private:
        url = private.create("restarting")
        private.stop("immediate")
        store = open_store(DatabaseSettings(url), 10)
        starting_up = asyncio.create_task(store.start())
        await asyncio.to_thread(private.start)
        await starting_up
        assert await store.ready() is None
        await store.stop(0)


@pytest.mark.faults
def test_a_hanging_statement_is_503_and_has_no_effect(postgres: Cluster, database: str, tmp_path: Path) -> None:
    """Other requests that need the connection are refused, too. Cached tokens are always validated."""
    config = postgres_config(tmp_path, database, POOL, connections=1)
    with worker(config) as server, Connection(server.port) as connection, ThreadPoolExecutor(3) as others:
        kept = connection.log_in()
        assert connection.valid(kept)
        began = rows(postgres, database)
        with held(postgres, database, "LOCK TABLE tokens IN ACCESS EXCLUSIVE MODE"):
            ends = [others.submit(Connection, server.port).result() for _ in range(3)]
            asked = [others.submit(ends[0].ask, "POST", "/api/token", LOGIN)]
            until(lambda: count(postgres, database, "wait_event_type = 'Lock'") == 1, "the statement hangs")
            asked.append(others.submit(ends[1].ask, "POST", "/api/pools/permits/leases", X_Token=kept))
            asked.append(others.submit(ends[2].ask, "GET", "/readyz"))
            until(
                lambda: connection.valid(kept) and all(answer.done() for answer in asked), "all requests are answered"
            )
            assert [answer.result().status for answer in asked] == [503, 503, 503]
            assert is_outage(asked[0].result())
            assert is_outage(asked[1].result())
        until(lambda: connection.ask("GET", "/readyz").status == 200, "a probe has succeeded")
        assert connection.valid(connection.log_in())
        assert rows(postgres, database) == began + 1, "must not write the refused login later"
        until(lambda: count(postgres, database, "state <> 'idle'") == 0, "all connections are idle")
        until(lambda: count(postgres, database, "true") <= 2, "one connection is left, and the listener's")
        check_log(server)
        for end in ends:
            end.close()


def test_a_read_only_database_refuses_writes_only(postgres: Cluster, database: str, tmp_path: Path) -> None:
    """A log-out is queued in memory, and written as soon as possible."""
    name = name_of(database)
    config = postgres_config(tmp_path, database, POOL)
    with worker(config) as server, Connection(server.port) as connection:
        kept, ended, unknown = (connection.log_in() for _ in range(3))
        postgres.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        postgres.terminate_all(name)
        until(lambda: connection.ask("GET", f"/api/token?token={kept}").status == 200, "the worker has reconnected")
        until(lambda: connection.ask("GET", "/api/tokens", X_Token=kept).status == 200, "the worker can read again")
        assert connection.valid(kept)
        assert connection.valid(unknown)
        assert is_outage(connection.ask("POST", "/api/token", LOGIN))
        assert is_outage(connection.ask("POST", "/api/pools/permits/leases", X_Token=kept))
        ready = connection.ask("GET", "/readyz")
        assert ready.status == 503
        assert "read-only transaction" in ready.json()["reason"]
        connection.log_out(ended)
        assert not connection.valid(ended)
        assert server.events("revocation_held_in_memory")
        postgres.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
        postgres.terminate_all(name)
        until(lambda: bool(server.events("token_revoked")), "the revocation is written")
        assert rows(postgres, database) == 2
        until(lambda: connection.ask("GET", "/readyz").status == 200, "the worker is ready")
        assert connection.valid(connection.log_in())
        assert connection.valid(kept)
        check_log(server)


def test_a_name_postgresql_cannot_store_is_no_5xx(database: str, tmp_path: Path) -> None:
    with worker(postgres_config(tmp_path, database)) as server, Connection(server.port) as connection:
        token = connection.log_in()
        for method in ("GET", "DELETE"):
            answer = connection.ask(method, "/api/tokens?user=a%00b", X_Token=token)
            assert answer.status in {200, 400}, answer
        assert connection.valid(token)
        check_log(server)


@pytest.mark.faults
@pytest.mark.parametrize("committed", [True, False], ids=["cut", "terminated"])
def test_a_connection_lost_during_commit_is_503(
    postgres: Cluster, database: str, tmp_path: Path, committed: bool
) -> None:
    """A log-out is answered, since it is retried."""
    name = name_of(database)
    with Proxy(postgres.port) as proxy, ThreadPoolExecutor(2) as others:
        config = postgres_config(tmp_path, postgres.url(name, proxy.port))
        with worker(config) as server, Connection(server.port) as one, Connection(server.port) as other:
            kept, ended = one.log_in(), one.log_in()
            for statement in _HOLD:
                postgres.execute(statement, name)
            with held(postgres, database, "SELECT pg_advisory_xact_lock(42)"):
                login = others.submit(one.ask, "POST", "/api/token", LOGIN)
                logout = others.submit(other.ask, "DELETE", "/api/token", {"token": ended})
                until(lambda: count(postgres, database, "wait_event_type = 'Lock'") == 2, "both are committing")
                if committed:
                    proxy.cut()
                else:
                    postgres.execute(f"SELECT pg_terminate_backend(pid) {OURS.format(name)}")
                assert is_outage(login.result())
                assert logout.result().status == 200
                proxy.heal()
                assert not other.valid(ended)
            # the retry adds no second entry to the log
            wanted = (1 + committed, 1)
            until(
                lambda: (rows(postgres, database), rows(postgres, database, "revocations")) == wanted,
                "the log-out is written",
            )
            until(lambda: other.ask("GET", "/readyz").status == 200, "the worker is ready")
            assert not other.valid(ended)
            assert other.valid(kept)
            assert other.valid(other.log_in())
            check_log(server)


def test_thirty_racing_holders_break_no_promise(postgres: Cluster, database: str, tmp_path: Path) -> None:
    """As on SQLite, the clock jumps during requests, often to just before a lease ends."""
    clock = HandClock(tmp_path / "clock", create=True)
    with two_workers(postgres_config(tmp_path, database, POOLS % {"lease_ttl": LEASE_TTL}), clock) as servers:
        run_race([server.port for server in servers], HandTime(clock), LEASE_TTL, REQUESTS)


async def test_a_long_revocation_stops_no_other_node(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What revokes many tokens has their lock for a while. What needs it waits, and logins that revoke none do not."""
    monkeypatch.setattr("tokenauth.stores.postgres.connections._PROOF", 0)
    async with nodes(database) as (node,), connected(database) as other:
        await node.tokens.issue(token(1), 0, START)
        async with other.transaction():
            await other.execute(f"SELECT pg_advisory_xact_lock({advisory_key(REVOCATION_LOCK)})")
            waiting = asyncio.ensure_future(node.tokens.revoke(token(1).digest, START))
            while not await other.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
                pass
            assert await node.ready() is None
            await node.tokens.issue(token(2), 0, START)
        assert await waiting


@contextmanager
def refusing_writes(postgres: Cluster, url: str, condition: str) -> Iterator[None]:
    """Refuse to write the clock and the probe under a condition, as something that is not supported.

    The sequence `refused` has the process ID of the connection that was refused last: a rollback does not change it.
    """
    name = name_of(url)
    postgres.execute("CREATE SEQUENCE refused", name)
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        f" $$BEGIN IF {condition} THEN PERFORM setval('refused', pg_backend_pid()); RAISE feature_not_supported;"
        " END IF; RETURN NEW; END$$",
        name,
    )
    trigger = "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON marks FOR EACH ROW EXECUTE FUNCTION refuse()"
    postgres.execute(trigger, name)
    try:
        yield
    finally:
        postgres.execute("DROP FUNCTION refuse CASCADE", name)
        postgres.execute("DROP SEQUENCE refused", name)


def limit_connections(postgres: Cluster, url: str, limit: int) -> None:
    """Refuse further connections of roles that are no superusers. The open ones stay. -1: no limit."""
    postgres.execute(f'ALTER DATABASE "{name_of(url)}" CONNECTION LIMIT {limit}')


async def soon(is_true: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is true. Meanwhile the stores of this process go on."""
    async with asyncio.timeout(20):
        while True:
            if await is_true():
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def refused_in_the_pool(
    postgres: Cluster, url: str, connections: int
) -> AsyncIterator[tuple[Store, Callable[[], Awaitable[None]]]]:
    """Open a store in a database that refuses writes and more connections, so that one is left in its pool.

    The second value waits until one more write has been refused in that connection: that of a probe.
    """
    name = name_of(url)
    async with nodes(url, connections=connections) as (node,):
        with refusing_writes(postgres, url, "true"):
            with pytest.raises(StoreUnavailable):
                await node.save_time(START + 1)
            await asyncio.gather(*(node.tokens.list("ann", START, 1) for _ in range(connections)))
            *others, left = postgres.execute(f"SELECT pid {OURS.format(name)} AND query LIKE '%FROM tokens%'")
            assert len(others) == connections - 1
            limit_connections(postgres, url, 1)
            for (pid,) in others:
                postgres.execute(f"SELECT pg_terminate_backend({pid})")

            async def is_refused() -> bool:
                return postgres.execute("SELECT last_value::int FROM refused", name) == [left]

            async def refused() -> None:
                postgres.execute("SELECT setval('refused', 1)", name)
                await soon(is_refused)

            yield node, refused


async def test_only_a_write_ends_an_outage(postgres: Cluster, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe uses a connection of its own, and one of the pool where the database allows no more."""
    be_patient(monkeypatch)
    async with refused_in_the_pool(postgres, database, 4) as (node, refused):
        for _ in range(3):
            await refused()
            assert "feature_not_supported" in (await node.ready() or "")
        postgres.execute("DROP TRIGGER refuse ON marks", name_of(database))
        await _issue_soon(node)


async def test_a_refused_probe_leaves_no_transaction(
    postgres: Cluster, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries use the connection of the pool in which it has failed."""
    be_patient(monkeypatch)
    async with refused_in_the_pool(postgres, database, 1) as (node, refused):
        await refused()
        await node.tokens.list("ann", START, 1)


async def test_a_full_database_is_read_when_it_has_room(postgres: Cluster, database: str) -> None:
    """Its refusal ends an outage of reading. Otherwise only probes would try to connect, and others would be faster."""

    async def is_full() -> bool:
        return "not writable: TooManyConnectionsError" in (await node.ready() or "")

    with Proxy(postgres.port) as proxy:
        async with nodes(postgres.url(name_of(database), proxy.port)) as (node,), AsyncExitStack() as others:
            proxy.cut()
            with pytest.raises(StoreUnavailable):
                await node.tokens.list("ann", START, 1)
            assert "store unreachable" in (await node.ready() or "")
            for _ in range(3):
                await others.enter_async_context(connected(database))
            limit_connections(postgres, database, 3)
            proxy.heal()
            await soon(is_full)
            limit_connections(postgres, database, -1)  # no probe runs meanwhile: this blocks the event loop
            await node.tokens.list("ann", START, 1)


@pytest.mark.parametrize("hosts", [1, 2, 3])
async def test_a_full_primary_begins_no_outage(monkeypatch: pytest.MonkeyPatch, hosts: int) -> None:
    """The open connections work, though a probe gets none. The third host is down."""
    be_patient(monkeypatch)
    monkeypatch.setattr("tokenauth.stores.postgres.connections._PROOF", 0)
    with two_servers() as (primary, standby, url):
        ports = [primary.port, standby.port, free_port()]
        async with nodes(several(url, *ports[:hosts])) as (node,):
            await asyncio.gather(*(node.tokens.list("ann", START, 1) for _ in range(4)))
            limit_connections(primary, url, 1)
            for number in range(10):
                assert await node.ready() is None
                await node.tokens.issue(token(number), 0, START)


async def test_a_busy_pool_begins_no_outage(postgres: Cluster, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that gets no connection does not wait for one of the pool while there is no outage."""
    be_patient(monkeypatch)
    monkeypatch.setattr("tokenauth.stores.postgres.connections._PROOF", 0)
    async with nodes(database, connections=1) as (node,), connected(database) as other:
        await node.tokens.issue(token(1), 0, START)
        limit_connections(postgres, database, 1)
        async with other.transaction():
            await other.execute(f"SELECT pg_advisory_xact_lock({advisory_key(REVOCATION_LOCK)})")
            waiting = asyncio.ensure_future(node.tokens.revoke(token(1).digest, START))
            while not await other.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
                pass
            assert isinstance(node.engine, PostgresEngine)
            assert await node.engine.connections.probed_problem() is None
        assert await waiting


async def test_a_probe_of_reading_may_be_unsupported(postgres: Cluster, database: str) -> None:
    """What only speaks PostgreSQL's protocol may refuse the probe. It answers, so queries are tried."""
    name = name_of(database)

    async def is_probed() -> bool:
        if postgres.execute("SELECT is_called FROM probes", name) == [(True,)]:
            return True
        postgres.execute(f"SELECT pg_terminate_backend(pid) {OURS.format(name)} AND query LIKE '%JOIN revocations%'")
        return False  # but it is probed when the revocation feed is lost

    async with nodes(database) as (node,):
        for statement in (
            "CREATE SEQUENCE probes",
            "CREATE FUNCTION refuse() RETURNS SETOF int LANGUAGE plpgsql SECURITY DEFINER AS"
            " $$BEGIN PERFORM nextval('probes'); RAISE feature_not_supported; END$$",
            "ALTER TABLE failures RENAME TO renamed",
            "CREATE VIEW failures AS SELECT refuse()",
            "GRANT ALL ON failures TO tokenauth",
        ):
            postgres.execute(statement, name)
        await soon(is_probed)
        assert await node.ready() is None
        await node.tokens.list("ann", START, 1)


async def test_a_probe_writes_without_lock_table(
    postgres: Cluster, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some databases that speak PostgreSQL's protocol lack it. A probe that wrote nothing would show nothing."""
    be_patient(monkeypatch)
    monkeypatch.setattr("tokenauth.stores.postgres.connections._PROOF", 0)
    locked = "EXISTS (SELECT FROM pg_locks WHERE relation = 'failures'::regclass AND pid = pg_backend_pid())"
    async with nodes(database) as (node,):
        with refusing_writes(postgres, database, locked):
            assert await node.ready() is None
        with refusing_writes(postgres, database, "true"):
            assert "feature_not_supported" in (await node.ready() or "")


async def test_a_missing_synchronous_standby_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a node that has written nothing."""
    with cluster(fsync=False) as primary:
        url = primary.create("tokenauth")
        async with nodes(url, 2) as (store, idle):
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
            primary.execute("SELECT pg_reload_conf()")
            until(lambda: primary.execute("SHOW synchronous_standby_names") == [("gone",)], "the setting is used")
            with pytest.raises(StoreUnavailable):
                await store.tokens.issue(token(1), 0, START)
            assert await store.ready() == "store not writable: commits wait for a synchronous standby"
            assert await idle.ready() is None
            monkeypatch.setattr("tokenauth.stores.postgres.connections._PROOF", 0)
            assert await idle.ready() == await store.ready()
            assert (await examine(DatabaseSettings(url))).problem == "commits wait for a synchronous standby"
            primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
            primary.execute("SELECT pg_reload_conf()")
            await _issue_soon(store)


async def _issue_soon(store: Store) -> None:
    """Issue a token as soon as the database can be written."""
    async with asyncio.timeout(20):
        while True:
            with suppress(StoreUnavailable):
                await store.tokens.issue(token(2), 0, START)
                return
            await asyncio.sleep(0.02)
