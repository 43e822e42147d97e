"""A commit whose wait for a synchronous standby ends early is not answered as made."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from itertools import count

import pytest

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.system.postgres.nodes import connected, fresh, nodes
from tokenauth.errors import StoreUnavailable
from tokenauth.models import Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import examine
from tokenauth.stores.store import Store

CHANGES: Mapping[str, Callable[[Store, int], Awaitable[object]]] = {
    "in one statement": lambda node, number: node.tokens.issue(
        Token.new(sha256(b"%d" % number).digest(), "ann", "c", START, int(START) + 100), 0, START
    ),
    "in a transaction": lambda node, number: node.save_time(START + 10 * number),
}

_CANCEL = """
    SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()
"""

_STUCK = """
    SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND state_change < clock_timestamp() - interval '1.1 s'
"""


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    with fresh(postgres) as made:
        yield made


@asynccontextmanager
async def waiting_for_a_standby(cluster: Cluster) -> AsyncIterator[None]:
    """Let each commit wait for a standby that does not exist."""
    cluster.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    cluster.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        cluster.execute("ALTER SYSTEM RESET synchronous_standby_names")
        cluster.execute("SELECT pg_reload_conf()")


async def test_commits_of_other_databases_may_wait(postgres: Cluster, url: str) -> None:
    """They may ask for more than those of this one, which waits for no standby."""
    postgres.execute(f'ALTER DATABASE "{url.rpartition("/")[2]}" SET synchronous_commit = local')
    with fresh(postgres) as other:
        async with nodes(url) as (node,), connected(other) as waiting, connected(other) as operator:
            async with waiting_for_a_standby(postgres):
                numbers = count()
                stuck = asyncio.create_task(waiting.execute(f"CREATE TABLE stuck{next(numbers)} ()"))
                while not await operator.fetch(_STUCK):
                    if stuck.done():  # PostgreSQL has not read its settings yet
                        stuck = asyncio.create_task(waiting.execute(f"CREATE TABLE stuck{next(numbers)} ()"))
                assert (await examine(DatabaseSettings(url))).problem is None
                await node.save_time(START + 1)
            await stuck


@pytest.mark.parametrize("how", CHANGES)
async def test_a_commit_that_standbys_may_lack_is_refused(postgres: Cluster, url: str, how: str) -> None:
    """An operator has cancelled its wait: it is on the primary alone, which a failover would replace."""
    async with nodes(url) as (node,), connected(url) as operator:
        async with waiting_for_a_standby(postgres):
            numbers = count()
            change = asyncio.ensure_future(CHANGES[how](node, next(numbers)))
            while not await operator.fetch(_CANCEL):
                if change.done():  # PostgreSQL has not read its settings yet
                    await change
                    change = asyncio.ensure_future(CHANGES[how](node, next(numbers)))
            with pytest.raises(StoreUnavailable):
                await change
            asking = asyncio.ensure_future(node.ready())
            while not asking.done():  # nor does a probe, whose wait is cancelled too, end the outage
                await operator.fetch(_CANCEL)
            assert await asking is not None
        async with asyncio.timeout(30):
            while await node.ready() is not None:
                await operator.fetch("SELECT")  # so that the probe goes on
        await CHANGES[how](node, next(numbers))
