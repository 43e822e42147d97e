"""Two servers believe that they are the primary: only the one that was promoted last is asked."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, TypeVar

import pytest
import structlog

from tests.contract.conftest import token
from tests.support.journal import until
from tests.support.patience import LONG, be_patient
from tests.support.postgres import Cluster, cluster
from tests.support.servers import START
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.nodes import nodes
from tests.system.postgres.test_hosts import several
from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.postgres import hosts, standbys
from tokenauth.stores.postgres.engine import PostgresEngine
from tokenauth.stores.postgres.hosts import HostConnection
from tokenauth.stores.postgres.listener import BOUND
from tokenauth.stores.store import Store

T = TypeVar("T")


@contextmanager
def two_servers() -> Iterator[tuple[Cluster, Cluster, str]]:
    """Run a primary and its standby; yield them with the URL of a database."""
    with cluster(fsync=False) as primary:
        url = primary.create("tokenauth")
        with primary.standby() as standby:
            yield primary, standby, url


async def _done(act: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of a store as soon as it gives one."""
    async with asyncio.timeout(60):
        while True:
            with suppress(StoreUnavailable):
                return await act()
            await asyncio.sleep(0.02)


async def _watched_by(*nodes: Store) -> None:
    """Wait until each node has asked the standby whether it was promoted."""
    async with asyncio.timeout(60):
        for node in nodes:
            assert isinstance(node.engine, PostgresEngine)
            while not await node.engine.connections.standbys.ask():  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.001)


async def _answered(store: Store, number: int) -> bool:
    """Return whether a token is accepted, as soon as the store answers."""
    return await _done(lambda: store.tokens.get(token(number).digest)) is not None


@pytest.mark.faults
async def test_a_start_waits_for_a_promotion() -> None:
    with two_servers() as (primary, standby, url):
        store = open_store(DatabaseSettings(several(url, primary.port, standby.port)), 10)
        primary.stop("immediate")
        starting = asyncio.create_task(store.start())
        assert not (await asyncio.wait({starting}, timeout=0.5))[0], "it must wait: nobody is the primary"
        standby.execute("SELECT pg_promote()")
        await starting
        assert await store.ready() is None
        await store.stop(START)


async def test_hosts_without_a_primary_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenauth.stores.postgres.engine._START_TIMEOUT", 0)
    with two_servers() as (primary, standby, url), Proxy(standby.port) as silent:
        silent.freeze()
        primary.stop("immediate")
        ports = primary.port, standby.port, silent.port
        states = "refuses connections", "is a standby", "does not answer"
        places = ", ".join(f"127.0.0.1:{port} {state}" for port, state in zip(ports, states, strict=True))
        with pytest.raises(StartError, match=f"cannot be used: no host is the primary: {places}$"):
            await open_store(DatabaseSettings(several(url, *ports)), 10).start()


async def test_what_waits_at_a_former_primary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only synchronous standby was promoted. What it is asked for then waits until it is known to be replaced."""
    be_patient(monkeypatch)
    with two_servers() as (primary, standby, url):
        async with nodes(several(url, primary.port, standby.port)) as (node,):
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.execute("SELECT pg_reload_conf()")
            until(lambda: primary.execute("SELECT sync_state FROM pg_stat_replication") == [("sync",)], "it follows")
            await node.tokens.issue(token(1), 0, START)
            standby.execute("SELECT pg_promote()")
            refused = False
            with structlog.testing.capture_logs() as logs:
                try:
                    async with asyncio.timeout(LONG / 2):
                        await node.tokens.issue(token(2), 0, START)
                except StoreUnavailable:  # as usual; on a busy machine, the promotion may be known before it is asked
                    refused = True
                await node.tokens.issue(token(3), 0, START)
            assert "store_not_writable" not in [entry["event"] for entry in logs]
            rows = standby.execute("SELECT count(*) FROM tokens", "tokenauth")
            assert rows == [(2 if refused else 3,)]


async def test_a_former_primary_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on. Other hosts are asked before a token is called unknown."""
    be_patient(monkeypatch)
    monkeypatch.setattr(hosts, "FIRST_PATIENCE", LONG)
    monkeypatch.setattr(standbys, "INTERVAL", LONG)
    monkeypatch.setattr(standbys, "PATIENCE", LONG)
    with two_servers() as (primary, standby, url):
        both = several(url, primary.port, standby.port)
        async with nodes(both, 2) as (one, other):
            await one.tokens.issue(token(1), 0, START)
            standby.follow(primary)
            await _watched_by(one, other)
            standby.execute("SELECT pg_promote()")
            async with nodes(both) as (new,):
                await new.tokens.issue(token(2), 0, START)
                assert await _answered(one, 2)
                await new.tokens.issue(token(3), 0, START)
                assert await _answered(other, 3)


async def test_a_node_that_only_reads_leaves_a_former_primary(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on, and the node sends nothing but the checks of a cached token, which need no query."""
    be_patient(monkeypatch)
    monkeypatch.setattr(hosts, "FIRST_PATIENCE", LONG)
    with two_servers() as (primary, standby, url):
        both = several(url, primary.port, standby.port)
        async with nodes(both) as (node,):
            await node.tokens.issue(token(1), 0, START)
            assert await _answered(node, 1)
            standby.follow(primary)
            await _watched_by(node)
            standby.execute("SELECT pg_promote()")
            async with nodes(both) as (new,):
                await new.tokens.revoke(token(1).digest, START)
            async with asyncio.timeout(LONG):
                while await _answered(node, 1):  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0.001)


async def test_a_connection_may_be_closed_at_any_step(
    monkeypatch: pytest.MonkeyPatch, postgres: Cluster, database: str
) -> None:
    """It may be to a former primary. asyncpg raises AttributeError if it is closed when a statement was prepared."""
    async with nodes(database) as (node,):
        prepare = getattr(HostConnection, "_get_statement")  # noqa: B009 - asyncpg's type stubs lack it

        async def closing(self: HostConnection, query: str, *arguments: Any, **options: Any) -> Any:
            statement = await prepare(self, query, *arguments, **options)
            if "DELETE FROM tokens" in query:
                self.terminate()
            return statement

        monkeypatch.setattr(HostConnection, "_get_statement", closing)
        with pytest.raises(StoreUnavailable):
            await node.tokens.revoke(token(1).digest, START)
        monkeypatch.undo()
        assert not await _done(lambda: node.tokens.revoke(token(1).digest, START))


async def test_a_silent_standby_delays_an_answer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as unreachable until it can be connected to. Then it is asked again."""
    be_patient(monkeypatch)
    monkeypatch.setattr(hosts, "FIRST_PATIENCE", LONG)
    with two_servers() as (primary, standby, url), Proxy(standby.port) as way:
        both = several(url, primary.port, way.port)
        async with nodes(both) as (node,):
            await _watched_by(node)
            way.freeze()
            assert await node.tokens.get(token(99).digest) is None
            monkeypatch.setattr(standbys, "PATIENCE", LONG)
            async with asyncio.timeout(LONG / 2):
                for number in range(8):
                    await node.tokens.issue(token(number), 0, START)
                    assert await node.tokens.get(token(99).digest) is None
            standby.follow(primary)
            way.heal()
            await _watched_by(node)
            standby.execute("SELECT pg_promote()")
            async with nodes(both) as (new,):
                await new.tokens.issue(token(9), 0, START)
            assert await _answered(node, 9)


async def test_a_woken_former_primary_is_not_asked() -> None:
    """It is silent while its standby is promoted, and wakes with what it had then: also in connections that it kept."""
    with two_servers() as (primary, standby, url), Proxy(primary.port) as way, Proxy(standby.port) as longer:
        both = several(url, way.port, longer.port)
        async with nodes(both, 2) as (one, other):
            for number in (1, 2):
                await one.tokens.issue(token(number), 0, START)
            assert await _answered(other, 1)
            standby.follow(primary)
            way.freeze()
            standby.execute("SELECT pg_promote()")
            await _done(lambda: one.tokens.list("ann", START, 1))  # no cache answers this
            await _done(lambda: one.tokens.revoke(token(1).digest, START))
            revoked_at = asked_at = monotonic()
            while await _answered(other, 1):  # from its cache, which it may use until then
                assert asked_at < revoked_at + BOUND
                await asyncio.sleep(0)
                asked_at = monotonic()
            longer.cut()
            way.heal()
            for store in (one, other):
                with pytest.raises(StoreUnavailable):  # only the former primary can be reached
                    await store.tokens.get(token(1).digest)
            longer.heal()
            longer.delay(0.005)  # so the former primary answers first
            assert primary.execute("SELECT count(*) FROM tokens", "tokenauth") == [(2,)], "it has the revoked token"
            for number in range(3, 9):
                results = await asyncio.gather(*(_answered(store, 1) for store in (one, other) for _ in range(10)))
                assert not any(results), "answered by the former primary"
                await _done(lambda: one.tokens.issue(token(number), 0, START))  # noqa: B023
        async with nodes(both, 3) as fresh:
            for store in fresh:
                assert not await _answered(store, 1), "a node that starts takes the former primary"
                assert await _answered(store, 3)
