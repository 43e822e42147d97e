"""PostgreSQL's log contains no token when it logs all statements."""

import asyncio

import pytest
from sqlalchemy import make_url

from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.system.postgres.nodes import nodes
from tokenauth.models import Pool

POOL = Pool("permits", lease_ttl=60)


@pytest.mark.parametrize(("length", "leaks"), [(0, False), (-1, True)])
async def test_statements_are_logged_without_values(postgres: Cluster, url: str, length: int, leaks: bool) -> None:
    """With `log_parameter_max_length = 0`, which the documentation requires since it is not the default."""
    name = make_url(url).database
    postgres.execute(f"ALTER DATABASE \"{name}\" SET log_statement = 'all'")
    postgres.execute(f'ALTER DATABASE "{name}" SET log_parameter_max_length = {length}')
    value, holder = f"canary-value-{length}", f"canary-holder-{length}"
    async with nodes(url) as (node,):
        await node.pools.generate(POOL, [value], START)
        assert (await node.pools.assign(POOL, holder, START)).token is not None
        assert await node.pools.get(POOL, value, START) is not None
        await node.pools.release(POOL, value, START)
        await node.pools.delete(POOL, value, START)
    text = await asyncio.to_thread(postgres.log.read_text)
    assert "pool_tokens" in text
    assert (value in text, holder in text) == (leaks, leaks)
