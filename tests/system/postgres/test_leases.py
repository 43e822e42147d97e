"""Concurrent leases of several nodes: they skip tokens that another transaction has locked, without waiting."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.support.servers import START
from tests.system.postgres.nodes import Nodes, connected
from tokenauth.models import LeaseCheck, Pool, PoolCounts, PoolToken
from tokenauth.stores.store import Store

POOL = Pool("p", lease_ttl=60)


@asynccontextmanager
async def locking(url: str, number: int) -> AsyncIterator[None]:
    """Lock the rows of the tokens that have been free longest, as another program could."""
    lock = "SELECT FROM pool_tokens WHERE number IN (SELECT number FROM pool_tokens ORDER BY free_at, number LIMIT $1)"
    async with connected(url) as connection, connection.transaction():
        await connection.execute(f"{lock} FOR UPDATE", number)
        yield


async def lease(three: Nodes, number: int, now: float = START) -> list[PoolToken | None]:
    """Assign tokens to `number` callers concurrently."""
    asked = (three[each % len(three)].pools.assign(POOL, f"h{each}", now) for each in range(number))
    return [granted.token for granted in await asyncio.gather(*asked)]


def values(leased: Sequence[PoolToken | None]) -> set[str]:
    """Return the values of the leased tokens. Each must have been leased once."""
    found = [token.value for token in leased if token]
    assert len(found) == len(set(found)), "a token was leased twice"
    return set(found)


@pytest.mark.parametrize("locked", [1, 30, 350], ids=["one", "some", "more-than-the-first-query-reads"])
async def test_locked_tokens_are_skipped_without_waiting(url: str, three: Nodes, locked: int) -> None:
    """Nothing unlocks the rows, so a request that waited would fail after some seconds."""
    names = [f"t{number:03}" for number in range(locked + 40)]
    await three[0].pools.generate(POOL, names, START)
    async with locking(url, locked):
        assert values(await lease(three, 40)) == set(names[locked:])
        assert (await three[0].pools.assign(POOL, "ann", START)).token is None
        assert await three[0].pools.count(POOL, START) == PoolCounts(locked, 40)
    again = await lease(three, min(locked, 40))
    assert values(again) <= set(names[:locked])
    assert None not in again


async def test_three_machines_lease_each_token_once(three: Nodes) -> None:
    await three[0].pools.generate(POOL, [f"t{number}" for number in range(90)], START)
    for fence in range(1, 4):
        leased = await lease(three, 90, START + 60 * fence)
        assert None not in leased
        assert len(values(leased)) == 90
        assert {token.fence for token in leased if token} == {fence}


async def test_a_client_that_releases_first_always_finds_a_token(three: Nodes) -> None:
    await three[0].pools.generate(POOL, ["a", "b", "c"], START)

    async def take_turns(node: Store, holder: str) -> int:
        refused = 0
        for _ in range(25):
            token = (await node.pools.assign(POOL, holder, START)).token
            if token is None:
                refused += 1
                continue
            released = await node.pools.release(POOL, token.value, START, LeaseCheck(holder, token.fence))
            assert released is not None
            assert released.granted
        return refused

    assert await asyncio.gather(*(take_turns(node, f"h{number}") for number, node in enumerate(three))) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(2))
async def test_a_smaller_pool_never_leases_more_than_its_capacity(three: Nodes, seed: int) -> None:
    """Twelve tokens are leased when capacity drops to six. Six retire with their leases, and withhold free ones."""
    chance = random.Random(seed)
    large = replace(POOL, capacity=12, prefill=True)
    small = replace(large, capacity=6)
    assert await three[0].pools.fit(large, [f"t{number}" for number in range(12)], START) == 0
    held = [token for token in await lease(three, 12) if token]
    assert await three[1].pools.fit(small, (), START) == 0
    retired = {token.value for token in await three[2].pools.list_tokens(small, START, "", 99) if token.retired}
    assert (len(held), len(retired)) == (12, 6)
    chance.shuffle(held)
    count, assigned = len(held), 0

    async def release(node: Store, token: PoolToken) -> None:
        nonlocal count
        count -= 1  # from now on the lease may have ended
        released = await node.pools.release(small, token.value, START, LeaseCheck(token.holder, token.fence))
        assert released is not None
        assert released.granted

    async def assign(node: Store) -> None:
        nonlocal count, assigned
        token = (await node.pools.assign(small, "new", START)).token
        if token is not None:
            count, assigned = count + 1, assigned + 1
            assert count <= 6, f"{count} leases"
            assert token.value not in retired

    for number, token in enumerate(held):
        await asyncio.gather(release(three[number % 3], token), *(assign(node) for node in three))
    await asyncio.gather(*(assign(three[number % 3]) for number in range(9)))
    assert (count, assigned) == (6, 6), "must lease the whole capacity in the end"
    assert await three[0].pools.count(small, START) == PoolCounts(0, 6)
