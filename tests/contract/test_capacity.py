"""PoolStore.generate: never more tokens than the capacity, and all of the requested ones or none."""

import asyncio
import math
from dataclasses import replace

from tests.contract.conftest import Place
from tests.contract.test_pools import END, JUST, POOL, lease, members
from tests.support.servers import START
from tokenauth.models import PoolCounts
from tokenauth.stores.store import PoolStore


async def test_a_pool_with_no_capacity_takes_any_number(pools: PoolStore) -> None:
    assert await pools.generate(POOL, [f"{number:04}" for number in range(3000)], START)
    assert await pools.generate(POOL, ["more"], START)
    assert await pools.count(POOL, START) == PoolCounts(3001, 0)


async def test_either_all_given_tokens_are_generated_or_none(pools: PoolStore) -> None:
    pool = replace(POOL, capacity=3)
    steps = [(["a", "b"], True), (["c", "d"], False), (["e"], True), (["f"], False), ([], True)]
    for values, fit in steps:
        assert await pools.generate(pool, values, START) is fit, values
    assert await members(pools, pool) == ["a", "b", "e"]
    assert await pools.generate(replace(pool, name="q", capacity=0), ["a"], START) is False


async def test_capacity_counts_free_and_leased_tokens(pools: PoolStore) -> None:
    pool = replace(POOL, capacity=3)
    assert await pools.generate(pool, ["a", "b", "c"], START)
    for _ in range(3):
        await lease(pools, pool)
        assert await pools.generate(pool, ["d"], START) is False
    await pools.release(pool, "b", START)
    assert await pools.generate(pool, ["d"], START) is False, "free is not gone"
    await pools.delete(pool, "a", START)
    assert await pools.generate(pool, ["d"], START) is True
    assert await pools.generate(pool, ["e"], START) is False


async def test_a_token_frees_its_place_when_it_expires(pools: PoolStore) -> None:
    pool = replace(POOL, capacity=2)
    await pools.generate(pool, ["a", "b"], START)
    await lease(pools, pool)
    for now, room in [(END - JUST, False), (END, True), (END + 60 - JUST, False), (END + 60, True)]:
        assert await pools.generate(pool, [f"at {now}"], now) is room, now
    assert len(await members(pools, pool, END + 60)) == 2


async def test_a_longer_token_ttl_revives_no_replaced_token(pools: PoolStore) -> None:
    pool = replace(POOL, capacity=3)
    for round in range(4):
        assert await pools.generate(pool, [f"{round}a", f"{round}b"], START + 240 * round)
    now = START + 240 * 3
    assert await members(pools, pool, now) == ["3a", "3b"]
    assert len(await members(pools, replace(pool, token_ttl=math.inf), now)) <= 3


async def test_a_capacity_that_was_lowered_ends_nothing(pools: PoolStore) -> None:
    await pools.generate(replace(POOL, capacity=3), ["a", "b", "c"], START)
    lower = replace(POOL, capacity=1)
    assert await pools.generate(lower, ["d"], START) is False
    assert [await lease(pools, lower) for _ in range(3)] == ["a", "b", "c"]


async def test_concurrent_generates_never_exceed_the_capacity(place: Place, other: Place) -> None:
    pool = replace(POOL, capacity=100)
    values = [[f"{number}{letter}" for letter in "abc"] for number in range(50)]
    adds = [(place, other)[number % 2].pools.generate(pool, three, START) for number, three in enumerate(values)]
    added = await asyncio.gather(*adds)
    assert sum(added) == 33
    kept = [value for three, fit in zip(values, added, strict=True) if fit for value in three]
    for each in (place, other):
        assert await members(each.pools, pool) == sorted(kept)
    assert await place.pools.generate(pool, ["last"], START) is True
    assert await other.pools.generate(pool, ["one more"], START) is False
