"""Two nodes on one database, one of them behind a proxy that a test breaks, and ways to damage the revocation log."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

import asyncpg
import pytest
from sqlalchemy import make_url

from tests.contract.conftest import apart, token
from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.support.tcp_proxy import Proxy, listener
from tests.system.postgres.nodes import connected
from tokenauth.models import Token
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.postgres import listener as feed
from tokenauth.stores.postgres.engine import PostgresEngine
from tokenauth.stores.store import Store, TokenStore
from tokenauth.stores.tables import metadata

HOUR = 3600.0


class Node:
    """The store, feed and cache of one process, inside the test's process."""

    def __init__(self, engine: PostgresEngine) -> None:
        self.engine = engine
        self.store = Store(engine, 1000)
        self.listener = engine.feed
        self.asked = 0
        self.tokens = TokenStore(engine, TokenCache(self._look_up, self.listener, 1000))

    async def _look_up(self, digest: bytes) -> Token | None:
        """Look a token up, and count the lookup."""
        self.asked += 1
        return await self.engine.token(digest)

    async def reread(self) -> None:
        """Wait until the log has been read again. The connection must work."""
        self.listener.invalidate()
        await self.until_current()

    async def until_current(self, current: bool = True) -> None:
        """Wait until the feed is current, or until it is not."""
        await until(lambda: self.listener.is_current() is current)
        await asyncio.sleep(0)  # let callbacks of this loop iteration finish

    async def valid(self, tokens: Sequence[Token]) -> list[bool]:
        """Return, for each token, whether this node accepts it."""
        return [await self.tokens.get(one.digest) is not None for one in tokens]

    async def looks_up(self, tokens: Sequence[Token]) -> list[bool]:
        """Return, for each token, whether it is looked up in the database."""
        asked = []
        for one in tokens:
            before = self.asked
            await self.tokens.get(one.digest)
            asked.append(self.asked > before)
        return asked

    async def remove(self, *tokens: Token) -> None:
        """Revoke tokens one after the other."""
        for one in tokens:
            assert await self.tokens.revoke(one.digest, START)


_names = (f"feed_{number}" for number in count())


def database_of(cluster: Cluster) -> str:
    """Create a database with the schema; return its URL."""
    url = cluster.create(next(_names))
    apart(_upgrade(url))
    return url


async def _upgrade(url: str) -> None:
    async with opened(url):
        pass


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.001)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Node]:
    """Open a database, as another process would."""
    node = Node(PostgresEngine(make_url(url), 2, lambda: START, serving=True, create=True))
    await node.store.start()
    try:
        yield node
    finally:
        await node.store.stop(0)


TOKENS = [token(number, age=-number) for number in range(12)]


@pytest.fixture(scope="module", name="url")
def make_database(postgres: Cluster) -> Iterator[str]:
    """Create one database for all tests of a module."""
    made = database_of(postgres)
    yield made
    postgres.drop(made.rpartition("/")[2])


@pytest.fixture(name="network")
def run_network(postgres: Cluster) -> Iterator[Proxy]:
    """Run a proxy between one node and the database."""
    with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture(name="nodes")
async def open_nodes(url: str, network: Proxy) -> AsyncIterator[Sequence[Node]]:
    """Open two nodes on a database with TOKENS. The second is behind the proxy and has all of them in its cache."""
    async with connected(url) as db:
        await db.execute(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")
    behind = url.replace(url.rpartition(":")[2].partition("/")[0], str(network.port))
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(opened(each)) for each in (url, behind)]
        for one in TOKENS:
            await here.tokens.issue(one, 0, START)
        assert await there.valid(TOKENS) == [True] * len(TOKENS)
        yield [here, there]


@pytest.fixture(name="patient")
def be_patient(monkeypatch: pytest.MonkeyPatch, nodes: object) -> None:
    """Keep the feed current on slow machines, too: only the test invalidates it."""
    monkeypatch.setattr(feed, "BOUND", HOUR)


def left(*removed: Token) -> list[bool]:
    """Return, for each of TOKENS, whether it was not removed."""
    return [one not in removed for one in TOKENS]


async def lose(node: Node, network: Proxy) -> None:
    """Break a node's feed, and wait until the node has noticed."""
    network.cut(only=listener)
    node.listener.invalidate()
    await node.until_current(False)


async def find(node: Node, network: Proxy) -> None:
    """Restore the feed, and wait until the log was read."""
    network.heal()
    await node.until_current()


async def _lose_the_last(db: asyncpg.Connection, count: int) -> None:
    """Lose the last removals and their sequence numbers, as a failover to a lagging standby does."""
    lost = await db.fetchval("SELECT min(seq) FROM (SELECT seq FROM revocations ORDER BY seq DESC LIMIT $1) x", count)
    await db.execute("DELETE FROM revocations WHERE seq >= $1", lost)
    await db.execute("SELECT setval(pg_get_serial_sequence('revocations', 'seq'), $1, false)", lost)


async def _roll_back(db: asyncpg.Connection) -> None:
    """Take sequence numbers that are never used, as rolled-back transactions do."""
    for _ in range(5):
        await db.execute("SELECT nextval(pg_get_serial_sequence('revocations', 'seq'))")


Change = Callable[[asyncpg.Connection], Awaitable[object]]

LOGS: Mapping[str, Change] = {
    "unchanged": lambda db: db.fetch("SELECT 1"),
    "gap": _roll_back,
    "trimmed-to-the-last": lambda db: db.execute(
        "DELETE FROM revocations WHERE seq < (SELECT max(seq) FROM revocations)"
    ),
    "lost-one": lambda db: _lose_the_last(db, 1),
    "lost-two": lambda db: _lose_the_last(db, 2),
    "lost-all": lambda db: db.execute("TRUNCATE revocations RESTART IDENTITY"),
    "emptied": lambda db: db.execute("DELETE FROM revocations"),
}


async def change_the_log(nodes: Sequence[Node], network: Proxy, url: str, change: str, more: int) -> None:
    """Damage the log and revoke more tokens while a node's feed is lost. The node must refuse all revoked tokens."""
    here, there = nodes
    await here.remove(*TOKENS[:3])
    await there.reread()
    assert await there.valid(TOKENS) == left(*TOKENS[:3])
    await lose(there, network)
    async with connected(url) as db:
        await LOGS[change](db)
    await here.remove(*TOKENS[3 : 3 + more])
    await find(there, network)
    assert await there.valid(TOKENS) == left(*TOKENS[: 3 + more])
    await here.remove(TOKENS[11])
    await there.reread()
    assert await there.valid(TOKENS) == left(*TOKENS[: 3 + more], TOKENS[11])
