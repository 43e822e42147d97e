"""A database that is replaced by another of the same name: nodes drop what they have cached of the first."""

import asyncio
from contextlib import suppress

import pytest

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.system.postgres.feeds import TOKENS, opened
from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.models import ServedDatabase
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store


async def test_a_node_notices_a_new_database_with_empty_logs(postgres: Cluster, url: str) -> None:
    name = url.rpartition("/")[2]
    async with opened(url) as node:
        for one in TOKENS:
            await node.tokens.issue(one, 0, START)
        assert await node.valid(TOKENS) == [True] * len(TOKENS)
        postgres.drop(name)
        postgres.create(name, "node_template")
        found: list[bool] = [True]
        async with asyncio.timeout(30):
            while any(found):
                with suppress(StoreUnavailable):  # while the database is missing
                    found = await node.valid(TOKENS)
                await asyncio.sleep(0.01)
        assert await node.valid(TOKENS) == [False] * len(TOKENS)


async def test_a_later_worker_creates_no_tables(postgres: Cluster, url: str) -> None:
    """Otherwise each token of a database that was dropped and created again would be "not valid", and not 503."""
    name = url.rpartition("/")[2]
    async with opened(url) as node:
        served = ServedDatabase(node.store.identity, required=False)
    postgres.drop(name)
    postgres.create(name)
    with pytest.raises(StartError, match="has no tables of tokenauth"):
        await open_store(DatabaseSettings(url), 10, served=served).start()
    assert postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name) == []
