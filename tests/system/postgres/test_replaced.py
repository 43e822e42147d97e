"""A database that is replaced by another of the same name: nodes drop what they have cached of the first."""

import asyncio
from contextlib import suppress

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.system.postgres.feeds import TOKENS, opened
from tokenauth.errors import StoreUnavailable


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
