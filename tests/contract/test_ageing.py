"""PoolStore where `ages_while_leased`: a token that is not given back expires as if it had only waited."""

from dataclasses import replace

import pytest

from tests.contract.test_pools import AGEING, END, JUST, PATIENT, lease, members
from tests.support.servers import START
from tokenauth.models import PoolCounts
from tokenauth.stores.store import PoolStore


async def test_a_token_that_is_given_back_waits_for_its_full_time(pools: PoolStore) -> None:
    await pools.generate(AGEING, ["t1"], START)
    await lease(pools, AGEING)
    await pools.release(AGEING, "t1", START + 50)
    assert await members(pools, AGEING, END + 50 - JUST) == ["t1"]
    assert await members(pools, AGEING, END + 50) == []


async def test_a_lease_and_its_extension_restart_the_token_ttl(pools: PoolStore) -> None:
    await pools.generate(AGEING, ["t1"], START)
    await lease(pools, AGEING, START + 100)
    await pools.keep_alive(AGEING, "t1", START + 150)
    assert await members(pools, AGEING, END + 150 - JUST) == ["t1"]
    assert await members(pools, AGEING, END + 150) == []


async def test_a_leased_token_does_not_expire(pools: PoolStore) -> None:
    short = replace(AGEING, token_ttl=30)
    await pools.generate(short, ["t1"], START)
    await lease(pools, short)
    assert await pools.purge(short, START + 60 - JUST, 10) == 0
    assert await pools.count(short, START + 60 - JUST) == PoolCounts(0, 1)
    [leased] = await pools.list_tokens(short, START + 60 - JUST, "", 10)
    assert short.expires_at(leased) == START + 60
    assert await pools.keep_alive(short, "t1", START + 60 - JUST) is not None
    assert await members(pools, short, START + 120 - 2 * JUST) == ["t1"]
    assert await members(pools, short, START + 120 - JUST) == []


@pytest.mark.parametrize("all_at_once", [False, True])
async def test_an_extended_lapsed_token_gets_its_full_token_ttl(pools: PoolStore, all_at_once: bool) -> None:
    await pools.generate(AGEING, ["t1"], START)
    await lease(pools, AGEING)
    now = START + 200
    if all_at_once:
        assert await pools.keep_alive_free(AGEING, now, now, 10) == 1
    else:
        assert await pools.keep_alive(AGEING, "t1", now, include_free=True) is not None
    assert await members(pools, AGEING, now + 240 - JUST) == ["t1"]
    assert await members(pools, AGEING, now + 240) == []


async def test_those_that_have_expired_are_purged_and_make_room(pools: PoolStore) -> None:
    pool = replace(AGEING, capacity=3)
    await pools.generate(pool, ["kept", "given back", "lapsed"], START)
    for value in ("kept", "given back", "lapsed"):
        assert await lease(pools, pool) == value
    await pools.release(pool, "given back", START + 59)
    await pools.keep_alive(pool, "kept", START + 59)
    assert await pools.generate(pool, ["new"], END - JUST) is False
    assert await pools.purge(pool, END - JUST, 10) == 0
    assert await pools.purge(pool, END, 10) == 1
    assert sorted(await members(pools, replace(PATIENT, capacity=3), END)) == ["given back", "kept"]
    assert await pools.generate(pool, ["new"], END) is True
    assert await pools.generate(pool, ["newer"], END) is False
    assert await lease(pools, pool, END) == "given back"
